"""Which of the three layouts a state dict is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from tensorpar.gathering import annotated

LayoutName = Literal["hf", "tensorpar", "smdistributed"]


def recognise(model: nn.Module, state_dict: Mapping[str, Any]) -> LayoutName:
    """The layout of a full state dict of `model`, by its keys and the number of their dims.

    Hugging Face's layout and tensorpar's share all names; they differ where a plan takes axes
    apart. A dict without any such key is the same in both.
    """
    from tensorpar.translators.files import renamed
    from tensorpar.translators.slices import hf_shape
    from tensorpar.translators.smdistributed import is_smdistributed

    if is_smdistributed(state_dict):
        return "smdistributed"
    own, given = model.state_dict(), renamed(model, state_dict)
    for name, layout, _ in annotated(model):
        if name in given:
            ours, shape = tuple(own[name].shape), tuple(given[name].shape)
            if len(shape) != len(ours) or shape == tuple(hf_shape(layout, own[name].shape)) != ours:
                return "hf"
    return "tensorpar"
