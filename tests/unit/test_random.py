"""The two random streams: a fork leaves the common stream where it was, plus one draw."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorpar.random import Fork, draw_seed, mix


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 1000), st.integers(0, 1000))
def test_ranks_get_unlike_seeds(seed, first, second):
    """Seeds fit torch's generators, and differ between ranks in the bits that the CPU keeps."""
    assert 0 <= mix(seed, first) < 1 << 63
    if first != second:
        assert mix(seed, first) & 0xFFFFFFFF != mix(seed, second) & 0xFFFFFFFF


def test_seeds_that_differ_in_a_bit_give_unlike_streams():
    """Neighbouring seeds and ranks share no low bits beyond chance."""
    seeds = [mix(1 << bit, rank) & 0xFFFFFFFF for bit in range(63) for rank in range(8)]
    assert len(set(seeds)) == len(seeds)


def test_a_fork_returns_to_the_common_stream():
    """After `leave` the default generator goes on as if the fork had drawn one number."""
    torch.manual_seed(3)
    draw_seed()
    expected = torch.rand(4)
    drawn = {}
    for rank in (0, 1):
        torch.manual_seed(3)
        fork = Fork()
        fork.enter(rank)
        drawn[rank] = torch.rand(4)
        torch.rand(100)
        fork.leave()
        fork.leave()  # closing twice changes nothing
        assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], expected)


def test_a_copied_fork_is_outside():
    """A module copied while its door is open does not carry the saved state along."""
    torch.manual_seed(3)
    fork = Fork()
    fork.enter(0)
    state = torch.get_rng_state()
    copy.deepcopy(fork).leave()
    assert torch.equal(torch.get_rng_state(), state)
    fork.leave()
