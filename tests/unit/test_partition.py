"""Chunks of a dim: the rule itself, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tensorpar.partition import chunk_bounds, chunk_sizes, shard, unshard


@pytest.mark.parametrize(
    ("size", "num_ranks", "sizes"),
    [
        (12, 4, [3, 3, 3, 3]),
        (25, 4, [7, 7, 7, 4]),
        (25, 8, [4, 4, 4, 4, 4, 4, 1, 0]),
        (12, 8, [2, 2, 2, 2, 2, 2, 0, 0]),
        (1, 3, [1, 0, 0]),
        (0, 2, [0, 0]),
    ],
)
def test_sizes_by_hand(size, num_ranks, sizes):
    """The first ranks hold the ceiling, the last ones what is left."""
    assert chunk_sizes(size, num_ranks) == sizes


@pytest.mark.parametrize("size", range(12))
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_chunks_are_those_of_torch(size, num_ranks):
    """What DTensor's `Shard` holds, which is `torch.chunk` filled up with nothing."""
    theirs = [chunk.tolist() for chunk in torch.arange(size).chunk(num_ranks)] if size else []
    theirs += [[]] * (num_ranks - len(theirs))
    ours = [list(range(*chunk_bounds(size, num_ranks, rank))) for rank in range(num_ranks)]
    assert ours == theirs


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_out_of_range_is_refused(rank):
    """Rank -1 is no rank, though Python would find one."""
    with pytest.raises(ValueError, match=f"rank = {rank}, required"):
        chunk_bounds(8, 4, rank)


def test_shards_are_views():
    """Cutting copies nothing."""
    full = torch.zeros(5, 3)
    shard(full, 0, 2)[1][:] = 1
    assert full.sum(1).tolist() == [0, 0, 0, 3, 3]


@pytest.mark.parametrize("dim", [-1, 2])
def test_a_dim_out_of_range_is_refused(dim):
    """Negative dims count from an end that patterns move."""
    with pytest.raises(ValueError, match=r"dim = -?\d, required: a dim of .* \(5, 3\)"):
        shard(torch.zeros(5, 3), dim, 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([2, 3], r"\[2, 3\], required: \[3, 2\]"),
        ([3, 1, 1], r"required: \[2, 2, 1\]"),
        ([], "one tensor per rank"),
    ],
)
def test_what_is_no_partition_is_refused(sizes, message):
    """Ranks in the wrong order, a part of them, or none."""
    with pytest.raises(ValueError, match=message):
        unshard([torch.zeros(size, 3) for size in sizes], 0)


def test_chunks_of_different_tensors_are_refused():
    """The other dims must agree."""
    with pytest.raises(ValueError, match="all equal"):
        unshard([torch.zeros(2, 3), torch.zeros(2, 4)], 0)
