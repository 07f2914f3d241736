"""Tests of train/planning/."""
