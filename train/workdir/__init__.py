"""A run's folder: whole files, its lock, its copy in a bucket."""
