"""Shards of another rank are refused: what `torch.save` wrote on one rank holds only that one's.

A DTensor is pickled with the coordinates of the rank that wrote it. Read on another rank it looks
whole and fits, where sizes divide, and its values would silently be those of the wrong shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

_ADVICE = (
    "torch.save on one rank keeps that rank's shards only. For weights call model.save_pretrained "
    "or tensorpar.save_sharded on every rank, for a run tensorpar.save_checkpoint"
)


def _place(tensor: DTensor) -> list[tuple[int, int]]:
    """Of each mesh axis that shards the tensor: where on it, and its size."""
    mesh = tensor.device_mesh
    where = mesh.get_coordinate() or [-1] * mesh.ndim
    return [
        (where[axis], mesh.size(axis))
        for axis, placement in enumerate(tensor.placements)
        if placement.is_shard() or type(placement).__name__ == "_StridedShard"
    ]


def refuse_foreign_shards(module: nn.Module, state_dict: Mapping[str, Any], *_: object) -> None:
    """Pre-hook of `load_state_dict`.

    Raises:
        ValueError: a DTensor is the shard of another rank.
    """
    own = module.state_dict(keep_vars=True)
    for name, value in state_dict.items():
        wanted = own.get(name)
        if isinstance(value, DTensor) and isinstance(wanted, DTensor):
            _require_own(name, value, wanted)


def _require_own(name: str, found: DTensor, wanted: DTensor) -> None:
    if _place(found) != _place(wanted):
        raise ValueError(
            f"{name} = the shard at {_place(found)} (place, size of each sharding mesh axis), "
            f"required: this rank's, at {_place(wanted)}; {_ADVICE}"
        )


def _refuse_foreign_moments(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """All states of an optimizer have come the same way: the first that is sharded tells."""
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, DTensor):
            return
        if not _place(parameter):
            continue
        for name, value in state.items():
            if isinstance(value, DTensor) and value.shape == parameter.shape:
                _require_own(f"{type(optimizer).__name__} state {name}", value, parameter)
        return


register_optimizer_step_pre_hook(_refuse_foreign_moments)
