"""The parts of `bench_checkpoint.py`: each measures one thing and records it."""
