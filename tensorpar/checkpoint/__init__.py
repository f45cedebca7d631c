"""Checkpoints of training runs, on torch.distributed.checkpoint: saved, found again and resumed."""

from tensorpar.checkpoint.checkpoint import PendingSave, Resumed, load_checkpoint, save_checkpoint

__all__ = ["PendingSave", "Resumed", "load_checkpoint", "save_checkpoint"]
