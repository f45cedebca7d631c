"""Axis patterns: what they do to an index, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tensorpar.pattern import Pattern

FUSED = Pattern("i (b h d) -> b h d i")


def test_every_element_goes_where_the_axes_say():
    """The leftmost axis of a joined dim varies slowest."""
    theirs = torch.arange(4 * 3 * 5 * 2).view(4, 30)
    ours = FUSED.apply(theirs, b=3, h=5)
    assert ours.shape == (3, 5, 2, 4)
    for b in range(3):
        for h in range(5):
            for d in range(2):
                assert ours[b, h, d].tolist() == theirs[:, b * 10 + h * 2 + d].tolist()


def test_the_inverse_is_the_same_text_read_backwards():
    """And its own inverse is the pattern."""
    assert FUSED.inverse == Pattern("b h d i -> i (b h d)")
    assert FUSED.inverse.inverse == FUSED


def test_a_layout_is_a_view():
    """Nothing is copied where strides suffice; an identity returns the tensor itself."""
    theirs = torch.zeros(4, 30)
    FUSED.apply(theirs, b=3, h=5)[0, 0, 0, 0] = 1
    assert theirs[0, 0] == 1
    assert Pattern("v i -> v i").apply(theirs) is theirs


def test_sizes_of_other_axes_are_ignored():
    """One mapping of sizes serves all tensors of a layer."""
    assert Pattern("(o) -> o").apply(torch.zeros(7), h=5, b=3).shape == (7,)


def test_an_empty_axis_is_an_axis():
    """A rank without a head holds a tensor of no heads."""
    assert FUSED.apply(torch.zeros(4, 0), b=3, h=0, d=2).shape == (3, 0, 2, 4)


def test_the_right_axes_name_the_dims():
    """In order; a cut axis is found among them."""
    assert FUSED.right_axes == ["b", "h", "d", "i"]


@pytest.mark.parametrize(
    "text",
    ["i o", "i -> o -> i", "i o -> o", "i i -> i i", "i 1 -> i 1", "... i -> i ..."],
)
def test_what_is_no_bijection_is_refused(text):
    """When the pattern is written, not when it is used; the message shows the text."""
    with pytest.raises(ValueError, match=r"pattern = .*required"):
        Pattern(text)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((4, 31), {"b": 3, "h": 5}), ((4,), {"b": 3, "h": 5}), ((4, 30), {"b": 3})],
)
def test_what_does_not_fit_is_refused(shape, sizes):
    """The message has the shape, the pattern and the sizes."""
    with pytest.raises(ValueError, match="does not fit") as error:
        FUSED.apply(torch.zeros(shape), **sizes)
    for told in (str(tuple(shape)), FUSED.text, str(sizes)):
        assert told in str(error.value)
