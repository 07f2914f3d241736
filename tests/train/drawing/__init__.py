"""Tests of train/drawing."""
