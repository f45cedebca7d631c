"""`from_pretrained(None, config=..., state_dict=...)` with the state dict of a parallel model.

What `model.state_dict()` returns is sharded and in tensorpar's layout; Transformers loads tensors
that are whole and in its own. So they are made whole first, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from tensorpar.agreement import require_agreement
from tensorpar.gathering import whole_tensors
from tensorpar.mesh import tp_mesh
from tensorpar.narrowing import planned_layouts


def as_transformers_loads(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with every DTensor full, plain and in Hugging Face's layout. Collective.

    Args:
        model: the Transformers model that is to load it, not parallel yet.
        state_dict: plain tensors are Hugging Face's already; names may have the base model's prefix
            or lack it.

    Raises:
        ValueError: the ranks would not gather the same tensors; on every rank.
    """
    sharded = {name: value for name, value in state_dict.items() if isinstance(value, DTensor)}
    facts = {name: f"{value.dtype}{list(value.shape)}" for name, value in sharded.items()}
    require_agreement(facts, tp_mesh(), "tp ranks were given different DTensors to load")
    layouts = planned_layouts(model)
    prefix = f"{model.base_model_prefix}."
    out = dict(state_dict)
    for name, full in whole_tensors(sharded):
        names = (name, prefix + name, name.removeprefix(prefix))
        layout = next((layouts[each] for each in names if each in layouts), None)
        out[name] = full if layout is None else layout.pattern.inverse.apply(full)
    return out
