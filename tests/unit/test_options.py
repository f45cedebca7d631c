"""The options of a tensor-parallel region: what is accepted, and which mark a module gets."""

from __future__ import annotations

import pytest
from torch import nn

from tensorpar.options import Options, effective, mark


def test_options_are_read_with_their_defaults():
    """What is given wins over the caller's defaults, and those over the class's."""
    options = Options.of(True, {"check_batches": False}, delayed_parameter_initialization=True)
    assert options == Options(check_batches=False, delayed_parameter_initialization=True)
    assert Options.of(False, {}) == Options(enabled=False)


def test_unknown_and_mistyped_options_are_refused():
    """Every unknown option is named beside those that exist; only booleans are taken."""
    with pytest.raises(ValueError, match=r"unknown options \['a', 'b'\].*check_batches"):
        Options.of(True, {"b": True, "a": True})
    with pytest.raises(ValueError, match=r"unknown options \['enabled'\]"):
        Options.of(True, {"enabled": True})
    with pytest.raises(TypeError, match="check_batches = 1, required: True or False"):
        Options.of(True, {"check_batches": 1})


def test_the_nearest_mark_wins():
    """A module takes the mark at or nearest above it, else the default; shared ones the first."""
    shared = nn.Linear(1, 1)
    inner = nn.Sequential(nn.Linear(1, 1), shared)
    root = nn.Sequential(inner, nn.Sequential(nn.Linear(1, 1)), shared)
    off, on, default = Options(enabled=False), Options(), Options(check_batches=False)
    mark(inner, off)
    mark(inner[0], on)
    chosen = effective(root, default)
    assert chosen[root] == chosen[root[1]] == chosen[root[1][0]] == default
    assert chosen[inner] == chosen[shared] == off
    assert chosen[inner[0]] == on
    assert list(chosen) == list(root.modules())


def test_counts_are_integers_from_zero():
    """`check_replicas_every` is a count; booleans, floats and negative numbers are refused."""
    assert Options.of(True, {"check_replicas_every": 10}).check_replicas_every == 10
    for wrong in (True, 1.0, "1"):
        with pytest.raises(TypeError, match=r"check_replicas_every = .*required: an integer"):
            Options.of(True, {"check_replicas_every": wrong})
    with pytest.raises(ValueError, match="check_replicas_every = -1, required: 0 or more"):
        Options.of(True, {"check_replicas_every": -1})
