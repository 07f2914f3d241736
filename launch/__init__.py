"""Everything you can start: `python -m launch.NAME --help`."""
