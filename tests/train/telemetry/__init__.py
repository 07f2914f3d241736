"""Tests of train/telemetry/."""
