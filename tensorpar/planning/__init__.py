"""What a training step will hold, compute and send on each rank, found without allocating it."""
