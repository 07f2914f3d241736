"""Tests of launch/pages/."""
