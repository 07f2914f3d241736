"""Recorded arrays and the scripts that made them; each script says how to build its environment."""
