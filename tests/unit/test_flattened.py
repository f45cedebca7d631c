"""A parameter's shard as a matrix, kept between forwards that need no gradients."""

from __future__ import annotations

import gc
import weakref

import torch

from tensorpar.parameters import flattened


def test_it_is_kept_while_nothing_needs_gradients():
    """One view for all forwards, which sees what is written to the shard."""
    shard = torch.zeros(2, 3, 4)
    with torch.no_grad():
        kept = flattened(shard, 0, -2)
        shard.add_(1)
        assert flattened(shard, 0, -2) is kept
    assert torch.equal(kept, torch.ones(6, 4))


def test_gradients_pass_through_a_view_of_their_own():
    """What was kept before is no part of any graph."""
    shard = torch.zeros(2, 3, 4, requires_grad=True)
    with torch.no_grad():
        flattened(shard, 0, -2)
    flattened(shard, 0, -2).sum().backward()
    assert torch.equal(shard.grad, torch.ones(2, 3, 4))


def test_memory_that_was_exchanged_is_noticed():
    """`shard.data = other` leaves the tensor and changes what it holds."""
    shard = torch.zeros(2, 3, 4)
    with torch.no_grad():
        flattened(shard, 0, -2)
        shard.data = torch.ones(2, 3, 4)
        assert torch.equal(flattened(shard, 0, -2), torch.ones(6, 4))


def test_what_is_no_view_is_made_anew():
    """Flattening strided memory copies it; the copy is not kept, nor seen after an update."""
    shard = torch.zeros(3, 2, 4).transpose(0, 1)
    with torch.no_grad():
        copy = weakref.ref(flattened(shard, 0, -2))
        assert copy() is None
        shard.add_(1)
        assert torch.equal(flattened(shard, 0, -2), torch.ones(6, 4))


def test_it_lives_as_long_as_its_shard():
    """A tensor that held itself would wait for the garbage collector, with all its memory."""
    gc.disable()
    try:
        shard = torch.zeros(2, 3, 4)
        with torch.no_grad():
            kept = weakref.ref(flattened(shard, 0, -2))
        assert kept() is not None
        del shard
        assert kept() is None
    finally:
        gc.enable()
