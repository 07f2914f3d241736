"""Tests of train/scaling/."""
