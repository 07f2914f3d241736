"""A run's state on disk or in a bucket: complete or absent."""
