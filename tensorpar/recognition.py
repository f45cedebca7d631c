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
    from tensorpar.translators.smdistributed import is_smdistributed

    if is_smdistributed(state_dict):
        return "smdistributed"
    own = model.state_dict()
    for name, layout, _ in annotated(model):
        if name in state_dict and layout.pattern.text != layout.pattern.inverse.text:
            shape = tuple(state_dict[name].shape)
            if len(shape) != own[name].ndim:
                return "hf"
    return "tensorpar"
