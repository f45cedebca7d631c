"""What torch does not do with a DTensor of which some rank holds nothing, answered or refused.

For the largest element and the infinity norm torch refuses an empty tensor, so only the rank that
holds one would raise, while the others wait for it in the reduction. The answer is clear, though:
an empty shard counts as the operation's identity. This is the one place that reaches into DTensor's
dispatcher. FSDP2 has no answer, so a model that leaves a rank without a part is told apart here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from tensorpar.parameters import shard_dim
from tensorpar.partition import chunk_sizes

_aten = torch.ops.aten

#: operators, with what an empty shard counts as; norms need it for the infinity norm only.
_IDENTITIES = {
    _aten._foreach_norm.Scalar: 0.0,
    _aten.linalg_vector_norm.default: 0.0,
    _aten.max.default: -math.inf,
    _aten.min.default: math.inf,
}


def answer_empty_shards() -> None:
    """Let `clip_grad_norm_(norm_type=inf)` and `max` work on all ranks alike, in this process."""
    _handlers().update(dict.fromkeys(_IDENTITIES, _handle))


def _handlers() -> dict[Any, Any]:
    return DTensor._op_dispatcher._custom_op_handlers


def _handle(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """torch calls this in place of the operator; the operator itself is called from here."""
    tensors, *rest = args
    of_all_elements = len(rest) < 2 or not rest[1]
    if of_all_elements and (not rest or rest[0] == math.inf):
        identity = _IDENTITIES[op]
        many = isinstance(tensors, list | tuple)
        tensors = [_fill(x, identity) for x in tensors] if many else _fill(tensors, identity)
    handlers = _handlers()
    del handlers[op]
    try:
        return op(tensors, *rest, **kwargs)
    finally:
        handlers[op] = _handle


def _fill(tensor: Any, identity: float) -> Any:
    """A flat DTensor with the same elements that is empty on no rank.

    Its global shape says nothing true; reductions of all elements do not look at it.
    """
    if not isinstance(tensor, DTensor) or tensor.numel() == 0:
        return tensor
    shard = tensor.to_local().reshape(-1)
    shard = shard if shard.numel() else shard.new_full((1,), identity)
    placements = [Shard(0) if isinstance(p, Shard) else p for p in tensor.placements]
    length = torch.Size([tensor.device_mesh.size() * tensor.numel()])
    return DTensor.from_local(
        shard, tensor.device_mesh, placements, run_check=False, shape=length, stride=(1,)
    )


def empty_shard(model: nn.Module) -> str | None:
    """Why a tensor-parallel model cannot train data parallel; None if it can.

    FSDP2's reductions take no empty gradient, so one rank would raise and the others wait for it.
    """
    for name, parameter in model.named_parameters():
        dim = shard_dim(parameter)
        if isinstance(parameter, DTensor) and dim is not None and parameter.requires_grad:
            mesh = parameter.device_mesh
            size, degree = parameter.shape[dim], mesh.size(mesh.ndim - 1)
            if not chunk_sizes(size, degree)[-1]:
                return (
                    f"{name} leaves a rank without a part of its {size} along dim {dim} at "
                    f"tensor_parallel_degree = {degree}, required for data parallelism: a part on "
                    "every rank, since FSDP2 reduces no empty gradient; choose another degree"
                )
    return None
