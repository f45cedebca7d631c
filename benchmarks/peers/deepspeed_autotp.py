"""DeepSpeed's AutoTP for training: linear layers are sharded, embedding and head stay whole."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn


def engine(model: nn.Module, optimizer: Any, rows: int, ranks: int) -> Any:
    """DeepSpeed's engine around a model; `clip`, `step` and `zero_grad` are its own."""
    # it asks for a launcher's variables even though the ranks have met
    os.environ.setdefault("LOCAL_RANK", str(torch.distributed.get_rank()))
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "tensor_parallel": {"autotp_size": ranks},
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return made


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW as the other contestants have it."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
