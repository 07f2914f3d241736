"""Programs that return a `train.config.Run`; opened by path, imported by nobody."""
