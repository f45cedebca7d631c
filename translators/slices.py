"""Which part of a Hugging Face tensor a rank's shard is made of: pure arithmetic.

A shard is one contiguous slice of our tensor; of theirs it is one range of a dim or, where that dim
is several fused projections, one range of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
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


def shard_shape(layout: Layout, shape: torch.Size, num_ranks: int, rank: int) -> torch.Size:
    """The shape of a rank's shard in tensorpar layout; `shape` is that of the whole."""
    sizes = list(shape)
    if (dim := layout.shard_dim) is not None:
        start, stop = chunk_bounds(sizes[dim], num_ranks, rank)
        sizes[dim] = stop - start
    return torch.Size(sizes)


def read_parts(
    source: Any, layout: Layout, shape: torch.Size, num_ranks: int, rank: int
) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """What a rank's shard is made of, one read after the other; nothing else is read.

    Args:
        source: the Hugging Face tensor, or what reads slices of it when it is indexed.
        layout: the parameter's.
        shape: of the whole parameter in tensorpar layout.
        num_ranks: the tensor-parallel degree.
        rank: the shard's.

    Yields:
        A place in the shard, a slice per dim, and what belongs there, in tensorpar layout and in
        the dtype of `source`; a view of what `source` gave. None for an empty shard, one with
        everything where the shard is one range.
    """
    sizes = axis_sizes(layout, shape)
    if layout.cut is None:
        yield (slice(None),) * len(sizes), layout.pattern.apply(source[...], **sizes)
        return
    dim, ranges = hf_ranges(layout, sizes, num_ranks, rank)
    group = _left_groups(layout.pattern)[dim]
    outer = group[: group.index(layout.cut)]
    before = (slice(None),) * dim
    known = {axis: size for axis, size in sizes.items() if axis != layout.cut}
    known |= dict.fromkeys(outer, 1)
    numbers = product(*(range(sizes[axis]) for axis in outer))
    for number, (start, stop) in zip(numbers, ranges, strict=False):
        place = {axis: slice(i, i + 1) for axis, i in zip(outer, number, strict=True)}
        piece = layout.pattern.apply(source[(*before, slice(start, stop))], **known)
        yield tuple(place.get(axis, slice(None)) for axis in sizes), piece


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
