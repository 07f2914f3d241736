"""Tests of train/workdir/."""
