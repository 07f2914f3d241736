"""Tests of data/prepare/."""
