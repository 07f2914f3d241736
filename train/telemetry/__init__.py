"""What a run writes about itself, and its readers."""
