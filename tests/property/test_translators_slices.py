"""What a rank reads of a Hugging Face tensor is what `apply` and `shard` make of the whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorpar.partition import shard
from tensorpar.styles import Column, Row, VocabParallel
from tensorpar.translators.slices import axis_sizes, hf_ranges, hf_shape, shard_of
from tests import strategies

layouts = st.sampled_from(
    [
        layout
        for stored in ("oi", "io")
        for heads in (None, "heads")
        for style in (
            Column(heads=heads, stored=stored),
            Column(blocks=3, heads=heads, stored=stored),
            Row(heads=heads, stored=stored),
            VocabParallel(),
        )
        for layout in style.layouts.values()
        if layout.cut is not None
    ]
)


@given(layouts, st.data(), strategies.world_sizes())
def test_law_slices(layout, data, n):
    """shard_of(slices of s) == shard(p(s), n) on every rank; nothing is read for an empty shard."""
    drawn = data.draw(strategies.axis_sizes(layout.pattern.right_axes, smallest=1))
    ours = torch.arange(torch.Size(list(drawn.values())).numel()).reshape(list(drawn.values()))
    theirs = layout.pattern.inverse.apply(ours)
    assert hf_shape(layout, ours.shape) == theirs.shape
    sizes = axis_sizes(layout, ours.shape)
    assert sizes == drawn
    for rank, expected in enumerate(shard(ours, layout.shard_dim, n)):
        dim, ranges = hf_ranges(layout, sizes, n, rank)
        pieces = [theirs.narrow(dim, start, stop - start) for start, stop in ranges]
        assert sum(piece.numel() for piece in pieces) == expected.numel()
        if pieces:
            assert torch.equal(shard_of(layout, pieces, dim, sizes), expected)


@given(layouts, st.data(), strategies.world_sizes())
def test_ranges_of_all_ranks_are_the_whole(layout, data, n):
    """Every index of the dim is read by one rank, once."""
    sizes = data.draw(strategies.axis_sizes(layout.pattern.right_axes, smallest=1))
    read = []
    for rank in range(n):
        dim, ranges = hf_ranges(layout, sizes, n, rank)
        read += [index for start, stop in ranges for index in range(start, stop)]
    length = hf_shape(layout, torch.Size(list(sizes.values())))[dim]
    assert sorted(read) == list(range(length))
