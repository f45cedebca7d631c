"""Whether the saved state of an optimizer fits the one that is to load it, and the model.

All is checked before the optimizer is changed, and every problem is told at once.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

from tensorpar.gathering import hf_layout
from tensorpar.moments import CANNOT_FOLLOW, OptimizerState
from tensorpar.parameters import stored_parameters
from tensorpar.problems import refuse
from tensorpar.recognition import recognise
from tensorpar.replace import translate_functions

logger = logging.getLogger(__name__)

Optimizer = torch.optim.Optimizer
Parameters = dict[str, nn.Parameter]
LayoutName = Literal["hf", "tensorpar"]


def own_parameters(module: nn.Module, optimizer: Optimizer) -> Parameters:
    """The optimizer's parameters in its order, under the model's names for them."""
    names = {id(parameter): name for name, parameter in stored_parameters(module)}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := [tuple(p.shape) for p in held if id(p) not in names]:
        raise ValueError(
            f"the {type(optimizer).__name__} holds {len(foreign)} parameters that are not the "
            f"{type(module).__name__}'s, of shapes {foreign[:3]}, required: the model's own; build "
            "the optimizer after the model is parallel and has got all its heads"
        )
    return {names[id(parameter)]: parameter for parameter in held}


def under_own_names(module: nn.Module, given: OptimizerState) -> OptimizerState:
    """A tied parameter has several names; the model's first one for it counts."""
    first = {id(parameter): name for name, parameter in stored_parameters(module)}
    own = {
        name: first[id(parameter)]
        for name, parameter in stored_parameters(module, remove_duplicate=False)
    }
    groups = [
        {**group, "params": [own.get(name, name) for name in group["params"]]}
        for group in given.groups
    ]
    state = {own.get(name, name): held for name, held in given.state.items()}
    apart = {own.get(name, name): held for name, held in given.of_whole_weights.items()}
    return replace(given, state=state, groups=groups, of_whole_weights=apart)


def matched_groups(
    optimizer: Optimizer, parameters: Parameters, given: OptimizerState
) -> list[dict[str, Any]]:
    """For each group of the optimizer the saved options, under the optimizer's own indices."""
    problems = [f"{name} is missing" for name in parameters if name not in given.names]
    problems += [f"{name} is unknown" for name in given.names if name not in parameters]
    if len(optimizer.param_groups) != len(given.groups):
        problems.append(f"{len(given.groups)} groups, required {len(optimizer.param_groups)}")
    refuse("the optimizer's state dict does not fit the optimizer", problems)
    rest = iter(enumerate(parameters))
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        own = {name: index for index, name in islice(rest, len(group["params"]))}
        saved = next((one for one in given.groups if set(one["params"]) == set(own)), None)
        if saved is None:
            problems.append(f"no saved group holds the {len(own)} parameters of group {number}")
        else:
            groups.append({**saved, "params": list(own.values())})
    refuse("the optimizer's state dict does not fit the optimizer", problems)
    return groups


def recognised_layout(module: nn.Module, given: OptimizerState) -> LayoutName:
    """The layout of the moments, by their names and shapes; ValueError where it is another."""
    sample = {
        name: moment for moments in given.moments().values() for name, moment in moments.items()
    }
    layout = recognise(module, sample)
    if layout == "smdistributed":
        raise ValueError(
            f"parameters = {list(sample)[:3]}..., required: the names of Hugging Face's layout; "
            "smdistributed's optimizer files are not read"
        )
    logger.info("load_optimizer_state_dict: the moments are in %s layout", layout)
    return layout


def require_layout(module: nn.Module, layout: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless the layout is known, and one that this model's state can have."""
    if layout not in known:
        raise ValueError(f"layout = {layout!r}, required: one of {known}")
    if layout == "hf" and translate_functions(module):
        raise ValueError(
            "layout = 'hf' with modules that were replaced whole, required: 'tensorpar'; their "
            "translate functions say what becomes of parameters, not of an optimizer's groups"
        )


def require_shapes(
    module: nn.Module, parameters: Parameters, given: OptimizerState, layout: str
) -> None:
    """Raise ValueError listing every moment that does not have its parameter's shape."""
    shapes = {name: torch.empty(p.shape, device="meta") for name, p in parameters.items()}
    theirs = hf_layout(module, shapes)
    if layout == "hf":
        shapes = theirs
    problems = [
        f"{kind} of {name} has shape {tuple(moment.shape)}, required {tuple(shapes[name].shape)}"
        for kind, moments in given.moments().items()
        for name, moment in moments.items()
        if moment.shape != shapes[name].shape
    ]
    problems += [
        f"{kind} of {name} has shape {list(x.shape)}, required: of 1 and {list(theirs[name].shape)}"
        for name, apart in given.of_whole_weights.items()
        for kind, x in apart.items()
        if not set(x.shape) <= {1, *theirs[name].shape}
    ]
    refuse(CANNOT_FOLLOW, problems)
