"""Tests of models/huggingface/."""
