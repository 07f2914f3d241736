"""Tests import anything and are imported by nobody."""
