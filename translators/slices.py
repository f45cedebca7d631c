"""Which part of a Hugging Face tensor a rank's shard is made of: pure arithmetic.

A shard is one contiguous slice of our tensor; of theirs it is one range of a dim or, where that dim
is several fused projections, one range of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from tensorpar.partition import chunk_bounds
from tensorpar.pattern import Pattern
from tensorpar.styles import Layout


def axis_sizes(layout: Layout, shape: torch.Size) -> dict[str, int]:
    """The length of every axis of a tensor in tensorpar layout."""
    return dict(zip(layout.pattern.right_axes, shape, strict=True))


def hf_shape(layout: Layout, shape: torch.Size) -> torch.Size:
    """The shape in Hugging Face's layout of a tensor that has `shape` in ours."""
    return layout.pattern.inverse.apply(torch.empty(shape, device="meta")).shape


def hf_ranges(
    layout: Layout, sizes: Mapping[str, int], num_ranks: int, rank: int
) -> tuple[int, list[tuple[int, int]]]:
    """Where a rank's shard lies in the Hugging Face tensor.

    Args:
        layout: the parameter's; it must be cut.
        sizes: the full length of every axis.
        num_ranks: the tensor-parallel degree.
        rank: the shard's.

    Returns:
        A dim of the Hugging Face tensor and the half-open ranges of it, in order, that make up
        the shard; none where the rank holds nothing.
    """
    cut = layout.cut
    assert cut is not None
    groups = _left_groups(layout.pattern)
    dim, group = next((dim, group) for dim, group in enumerate(groups) if cut in group)
    place = group.index(cut)
    outer = prod(sizes[axis] for axis in group[:place])
    inner = prod(sizes[axis] for axis in group[place + 1 :])
    size = sizes[cut]
    start, stop = chunk_bounds(size, num_ranks, rank)
    if start == stop:
        return dim, []
    return dim, [((i * size + start) * inner, (i * size + stop) * inner) for i in range(outer)]


def shard_of(
    layout: Layout, pieces: list[torch.Tensor], dim: int, sizes: Mapping[str, int]
) -> torch.Tensor:
    """A rank's shard in tensorpar layout, from the ranges that `hf_ranges` told.

    Args:
        layout: the parameter's.
        pieces: the Hugging Face tensor's ranges, in order.
        dim: the dim they are ranges of.
        sizes: the full length of every axis.
    """
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    known = {axis: size for axis, size in sizes.items() if axis != layout.cut}
    return layout.pattern.apply(joined, **known)


def read_shard(
    source: Any, layout: Layout, shape: torch.Size, num_ranks: int, rank: int
) -> torch.Tensor:
    """A rank's shard in tensorpar layout, of which nothing else is read.

    Args:
        source: the Hugging Face tensor, or what reads slices of it when it is indexed.
        layout: the parameter's.
        shape: of the whole parameter in tensorpar layout.
        num_ranks: the tensor-parallel degree.
        rank: the shard's.

    Returns:
        In the dtype of `source`; it may be a view of a mapped file.
    """
    sizes = axis_sizes(layout, shape)
    if layout.cut is None:
        return layout.pattern.apply(source[...], **sizes)
    dim, ranges = hf_ranges(layout, sizes, num_ranks, rank)
    before = (slice(None),) * dim
    pieces = [source[(*before, slice(start, stop))] for start, stop in ranges]
    if not pieces:
        empty = [0 if axis == layout.cut else size for axis, size in sizes.items()]
        return torch.zeros(empty, dtype=source.dtype)
    return shard_of(layout, pieces, dim, sizes)


def _left_groups(pattern: Pattern) -> list[list[str]]:
    """The axes of each dim on a pattern's left side."""
    groups: list[list[str]] = []
    inside = False
    for token in pattern.inverse.right_axes:
        if inside:
            groups[-1].append(token.rstrip(")"))
        else:
            groups.append([token.strip("()")])
        inside = (inside or token.startswith("(")) and not token.endswith(")")
    return groups
