"""The likeliest token of a sharded vocabulary: its logits are gathered only if someone looks.

Of each row a rank needs its own largest logit and that one's token. Both travel in one integer,
whose order is first that of the logit and then that of the smaller token, as `torch.argmax` has
it. So one all-reduce (max) of 8 bytes a row takes the place of gathering the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from tensorpar.collectives import all_gather, all_reduce
from tensorpar.partition import chunk_bounds

_LAST_TOKEN = (1 << 32) - 1

_choosing: ContextVar[bool] = ContextVar("choosing_greedily", default=False)


@contextmanager
def choosing_greedily() -> Iterator[None]:
    """Within: of a head's logits, most likely nothing but the largest is asked for."""
    token = _choosing.set(True)
    try:
        yield
    finally:
        _choosing.reset(token)


def chooses_greedily() -> bool:
    """For a head: whether it may return `ShardedLogits`."""
    return _choosing.get() and not torch.is_grad_enabled()


class ShardedLogits(torch.Tensor):
    """Logits `[..., vocabulary]` in no memory but that of this rank's shard.

    A choice of rows and another dtype leave them sharded, `argmax` over the vocabulary gathers
    nothing. Any other operation is one on the whole logits, which all ranks gather for it.

    Attributes:
        num_tokens: in the vocabulary.
        mesh: the tp mesh.
    """

    num_tokens: int
    mesh: DeviceMesh

    @classmethod
    def of(cls, shard: torch.Tensor, num_tokens: int, mesh: DeviceMesh) -> ShardedLogits:
        """Of a rank's `shard`, `[..., this rank's tokens]`."""
        logits = shard.as_subclass(cls)
        logits.num_tokens, logits.mesh = num_tokens, mesh
        return logits

    @cached_property
    def whole(self) -> torch.Tensor:
        """Plain, the same on all ranks; the first call gathers it and is collective."""
        with torch._C.DisableTorchFunctionSubclass():
            shard = self.as_subclass(torch.Tensor)
            return all_gather(shard, shard.ndim - 1, self.num_tokens, self.mesh)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What `func` returns of the whole logits."""
        del types
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ON_SHARDS and args and type(args[0]) is cls:
                result = _ON_SHARDS[func](*args, **kwargs)
                if result is not None:
                    return result
            args, kwargs = tree_map_only(cls, lambda logits: logits.whole, (args, kwargs))
        return func(*args, **kwargs)


def _rows(logits: ShardedLogits, index: Any) -> ShardedLogits | None:
    """`logits[index]`, if that chooses rows by slices and numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    takes_all = len(parts) < logits.ndim or parts[-1] == slice(None)
    if not takes_all or any(type(part) not in (int, slice) for part in parts):
        return None
    rows = logits.as_subclass(torch.Tensor)[parts]
    return ShardedLogits.of(rows, logits.num_tokens, logits.mesh)


def _converted(logits: ShardedLogits, *args: Any, **kwargs: Any) -> ShardedLogits | None:
    """`logits.to(...)`, on the device where they are."""
    shard = logits.as_subclass(torch.Tensor).to(*args, **kwargs)
    if shard.device != logits.device:
        return None
    return ShardedLogits.of(shard, logits.num_tokens, logits.mesh)


def _argmax(
    input: ShardedLogits, dim: int | None = None, keepdim: bool = False
) -> torch.Tensor | None:
    """`torch.argmax` over the vocabulary, of logits that 32 bits hold."""
    if dim not in (-1, input.ndim - 1) or keepdim or input.dtype == torch.float64:
        return None
    return likeliest(input.as_subclass(torch.Tensor), input.num_tokens, input.mesh)


_ON_SHARDS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.__getitem__: _rows,
    torch.Tensor.to: _converted,
    torch.Tensor.argmax: _argmax,
    torch.argmax: _argmax,
}


def likeliest(shard: torch.Tensor, num_tokens: int, mesh: DeviceMesh) -> torch.Tensor:
    """`torch.argmax` of logits over a sharded vocabulary; one all-reduce.

    Args:
        shard: `[..., this rank's tokens]`, float32 or narrower.
        num_tokens: in the whole vocabulary.
        mesh: the tp mesh.

    Returns:
        int64 `[...]`, the same on all ranks. Of equal logits the first, NaN as the largest.
    """
    if shard.shape[-1]:
        start, _ = chunk_bounds(num_tokens, mesh.size(), mesh.get_local_rank())
        value, place = shard.float().max(-1)
        key = (_ordered(value) << 32) | (_LAST_TOKEN - start - place)
    else:
        least = torch.iinfo(torch.int64).min
        key = shard.new_full(shard.shape[:-1], least, dtype=torch.int64)
    return _LAST_TOKEN - (all_reduce(key, mesh, dist.ReduceOp.MAX) & _LAST_TOKEN)


def _ordered(value: torch.Tensor) -> torch.Tensor:
    """int64 in the order of float32, from its bits: those of negative numbers count downwards."""
    # NaN has many patterns and zero has two
    alike = torch.where(value.isnan(), torch.nan, value + 0.0)
    bits = alike.view(torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits).long()
