"""Tests of train/job/."""
