"""The training loop and what it is made of: step, loss, optimizer, checkpoints, metrics."""
