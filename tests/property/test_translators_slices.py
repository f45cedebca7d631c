"""What a rank reads of a Hugging Face tensor is what `apply` and `shard` make of the whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorpar.partition import shard
from tensorpar.styles import Column, Row, VocabParallel
from tensorpar.translators.slices import (
    axis_sizes,
    hf_ranges,
    hf_shape,
    read_parts,
    shard_shape,
)
from tests import strategies

layouts = st.sampled_from(
    [
        layout
        for stored in ("oi", "io")
        for heads in (None, "heads")
        for style in (
            Column(heads=heads, stored=stored),
            Column(blocks=3, heads=heads, stored=stored),
            Column(blocks=3, heads=heads, stored=stored, interleaved=heads is not None),
            Row(heads=heads, stored=stored),
            VocabParallel(),
        )
        for layout in style.layouts.values()
        if layout.cut is not None
    ]
)


@given(layouts, st.data(), strategies.world_sizes())
def test_law_slices(layout, data, n):
    """The parts of p⁻¹(x) make up shard(x, n) on every rank; they are read where they lie."""
    drawn = data.draw(strategies.axis_sizes(layout.pattern.right_axes, smallest=1))
    ours = torch.arange(torch.Size(list(drawn.values())).numel()).reshape(list(drawn.values()))
    theirs = layout.pattern.inverse.apply(ours).contiguous()
    assert hf_shape(layout, ours.shape) == theirs.shape
    assert axis_sizes(layout, ours.shape) == drawn
    memory = theirs.untyped_storage().data_ptr()
    for rank, expected in enumerate(shard(ours, layout.shard_dim, n)):
        filled = torch.full(shard_shape(layout, ours.shape, n, rank), -1)
        parts = list(read_parts(theirs, layout, ours.shape, n, rank))
        for place, values in parts:
            assert values.untyped_storage().data_ptr() == memory
            filled[place].copy_(values)
        assert torch.equal(filled, expected)
        assert sum(values.numel() for _, values in parts) == expected.numel()


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
