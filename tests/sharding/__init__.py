"""Tests of sharding/."""
