"""The arithmetic of shards: how one dim of a tensor is cut into contiguous chunks, one per rank.

Nothing here knows a model, a layout or a process group, so every rule can be tried with virtual
ranks. Uneven sizes follow `torch.chunk` and therefore DTensor's `Shard`: the first ranks hold
`ceil(size / num_ranks)`, the last ones less, possibly nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def chunk_bounds(size: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """The half-open range `[start, stop)` of `range(size)` that `rank` of `num_ranks` holds.

    Raises:
        ValueError: `rank` is not in `range(num_ranks)`.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank = {rank}, required: 0 <= rank < num_ranks = {num_ranks}")
    chunk = -(-size // num_ranks)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


def chunk_sizes(size: int, num_ranks: int) -> list[int]:
    """How much of a dim of `size` each of `num_ranks` ranks holds; the sum is `size`."""
    bounds = (chunk_bounds(size, num_ranks, rank) for rank in range(num_ranks))
    return [stop - start for start, stop in bounds]


def shard(full: torch.Tensor, dim: int, num_ranks: int) -> list[torch.Tensor]:
    """Cut `full` along `dim` into one view per rank.

    Raises:
        ValueError: `full` has no dim `dim`.
    """
    if not 0 <= dim < full.ndim:
        raise ValueError(f"dim = {dim}, required: a dim of a tensor of shape {tuple(full.shape)}")
    bounds = (chunk_bounds(full.shape[dim], num_ranks, rank) for rank in range(num_ranks))
    return [full.narrow(dim, start, stop - start) for start, stop in bounds]


def unshard(shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The inverse of `shard`: concatenate one chunk per rank along `dim`.

    Raises:
        ValueError: the chunks are not those of one tensor (ranks in the wrong order, one missing,
            other dims unequal).
    """
    if not shards:
        raise ValueError("shards = [], required: one tensor per rank")
    sizes = [part.shape[dim] for part in shards]
    expected = chunk_sizes(sum(sizes), len(sizes))
    if sizes != expected:
        raise ValueError(
            f"sizes along dim {dim} = {sizes}, required: {expected}; pass every rank once, in order"
        )
    rests = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in shards}
    if len(rests) > 1:
        raise ValueError(f"shapes besides dim {dim} = {sorted(rests)}, required: all equal")
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)
