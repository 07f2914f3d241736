"""From the names of dimensions to devices: meshes, layouts, and what a compiled program sends."""
