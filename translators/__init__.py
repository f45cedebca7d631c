"""Checkpoints between layouts."""
