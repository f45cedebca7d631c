"""Transformers' `Trainer` and accelerate's `Accelerator` for tensor-parallel models.

They need the package accelerate: `pip install tensorpar[trainer]`.
"""

from importlib.util import find_spec

if find_spec("accelerate") is None:
    raise ImportError("tensorpar.trainer needs accelerate; pip install 'tensorpar[trainer]'")

from tensorpar.trainer.accelerator import Accelerator
from tensorpar.trainer.trainer import DamagedCheckpointError, Trainer

__all__ = ["Accelerator", "DamagedCheckpointError", "Trainer"]
