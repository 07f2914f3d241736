"""Tests of train/checkpoint/."""
