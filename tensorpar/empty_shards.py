"""Largest element and infinity norm of a DTensor of which some rank holds nothing.

torch refuses them for an empty tensor, so only the rank that holds one would raise, while the
others wait for it in the reduction. The answer is clear, though: an empty shard counts as the
operation's identity. This is the one place that reaches into DTensor's dispatcher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

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
