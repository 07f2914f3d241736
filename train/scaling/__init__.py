"""Grids of runs and the laws fitted to them."""
