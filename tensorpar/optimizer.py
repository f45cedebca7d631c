"""The state of an optimizer over a parallel model, whole and in Hugging Face's layout, and back.

So a run moves between one process and any degree, in both directions, with its moments: what one
process's optimizer saved is loaded here, and what is gathered here one process's optimizer loads.

`torch.distributed.checkpoint.state_dict` is not used, for two reasons found by trying: reading the
state of an optimizer that has not stepped makes it step, so that its first real step counts as the
second; and loading a full dict sends every tensor from rank 0, though all ranks have it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from tensorpar.agreement import require_agreement
from tensorpar.gathering import TIMEOUT, hf_layout, tensorpar_layout, whole_tensors
from tensorpar.mesh import world
from tensorpar.model import DistributedModel
from tensorpar.moments import CANNOT_FOLLOW, OptimizerState, has_names, is_moment, read
from tensorpar.parameters import local, stored_parameters
from tensorpar.problems import refuse
from tensorpar.recognition import recognise
from tensorpar.rendezvous import rendezvous
from tensorpar.replace import translate_functions
from tensorpar.whole_weights import IsApart, tells_apart

logger = logging.getLogger(__name__)

Optimizer = torch.optim.Optimizer
Parameters = dict[str, nn.Parameter]
LayoutName = Literal["hf", "tensorpar"]


def optimizer_state_dict(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    layout: LayoutName = "hf",
    gather_to_rank0: bool = False,
    timeout: timedelta = TIMEOUT,
) -> dict[str, Any]:
    """The optimizer's state, full and plain on the CPU; collective over ALL ranks.

    It is what `Optimizer.state_dict()` would return in one process: by index, with the options of
    each group, and with the names of its parameters as `param_names`. In Hugging Face's layout an
    optimizer made in the same way over the plain model loads it.

    Args:
        model: the parallel model, or a `DistributedModel` of it.
        optimizer: over its parameters; each state has its parameter's shape, or no dims, except
            what Adafactor remembers of rows and columns, which is the same in both layouts.
        layout: of the moments, `"hf"` or `"tensorpar"`.
        gather_to_rank0: only global rank 0 gets it, other ranks an empty dict; one tensor is in
            flight at a time.
        timeout: how long to wait for the last rank to call this.

    Returns:
        A snapshot: contiguous tensors that share no memory with the optimizer's.

    Raises:
        TimeoutError: a rank does not make this call in time; on all ranks that do.
        ValueError: parameters that are not the model's, states of other shapes, or ranks whose
            optimizers differ; on every rank, before any tensor is gathered.
    """
    module = _inside(model)
    _check_layout(module, layout, ("hf", "tensorpar"))
    own = _own_state(module, optimizer, is_apart=tells_apart(module, optimizer))
    rank = rendezvous("optimizer_state_dict", timeout)
    _require_same_state(own)
    keep = not gather_to_rank0 or rank == 0
    state = {name: dict(whole_tensors(held, keep=keep)) for name, held in own.state.items()}
    if not keep:
        return {}
    for held in state.values():
        held.update({kind: x.clone() for kind, x in held.items() if _is_scalar_tensor(x)})
    apart = {
        name: {kind: x.cpu().clone() for kind, x in held.items()}
        for name, held in own.of_whole_weights.items()
    }
    full = replace(own, state=state, groups=copy.deepcopy(own.groups), of_whole_weights=apart)
    if layout == "hf":
        full = full.changed(lambda moments: _contiguous(hf_layout(module, moments)))
    return full.state_dict()


def local_optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """This rank's shards of the optimizer's state in tensorpar layout; nothing is communicated.

    Those of all ranks are what the functions of `tensorpar.translators` merge and reshard.

    Args:
        model: the parallel model, or a `DistributedModel` of it.
        optimizer: over its parameters.

    Returns:
        By index, with `param_names`; its tensors are the optimizer's own.

    Raises:
        ValueError: as `optimizer_state_dict`, or parameters that `fully_shard` has cut as well.
    """
    module = _inside(model)
    parameters = _parameters(module, optimizer)
    axes = {p.device_mesh.ndim for p in parameters.values() if isinstance(p, DTensor)}
    if max(axes, default=1) > 1:
        raise ValueError(
            "the parameters are sharded over several axes of the mesh, required: the "
            "tensor-parallel one alone; take optimizer_state_dict, which gathers"
        )
    own = _own_state(module, optimizer)
    return own.changed(
        lambda moments: {name: local(value) for name, value in moments.items()}
    ).state_dict()


def load_optimizer_state_dict(
    model: nn.Module,
    optimizer: Optimizer,
    state_dict: Mapping[str, Any],
    *,
    layout: Literal["auto"] | LayoutName = "auto",
) -> None:
    """Load a full state dict on every rank, which keeps its shard; nothing is communicated.

    Args:
        model: the parallel model, or a `DistributedModel` of it.
        optimizer: over its parameters, in groups that hold together what the saved ones do.
        state_dict: full and plain: from `optimizer_state_dict`, from the optimizer of the plain
            model, or keyed by name. One by index without `param_names` is matched by position.
        layout: of the moments, `"hf"`, `"tensorpar"`, or recognised by their shapes.

    Raises:
        ValueError: every parameter that is missing or unknown, every state of the wrong shape,
            groups that differ. The optimizer is unchanged then.
    """
    module = _inside(model)
    parameters = _parameters(module, optimizer)
    names = None if has_names(state_dict) else list(parameters)
    given = read(state_dict, names, is_apart=tells_apart(module, optimizer))
    given.require_plain()
    given = _under_own_names(module, given)
    groups = _matched_groups(optimizer, parameters, given)
    if layout == "auto":
        layout = _recognised(module, given)
    _check_layout(module, layout, ("auto", "hf", "tensorpar"))
    _check_moments(module, parameters, given, layout)
    if layout == "hf":
        given = given.changed(lambda moments: tensorpar_layout(module, moments))
    index = {name: i for i, name in enumerate(parameters)}
    state = {
        index[name]: {kind: _placed(x, parameters[name]) for kind, x in held.items()}
        for name, held in given.state.items()
    }
    for name, apart in given.of_whole_weights.items():
        state[index[name]] |= {kind: x.clone() for kind, x in apart.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _inside(model: nn.Module) -> nn.Module:
    return model.get_module() if isinstance(model, DistributedModel) else model


def _parameters(module: nn.Module, optimizer: Optimizer) -> Parameters:
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


def _own_state(module: nn.Module, optimizer: Optimizer, **options: IsApart) -> OptimizerState:
    """The optimizer's state as it is; its moments are DTensors."""
    parameters = _parameters(module, optimizer)
    held = optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in held["param_groups"]
    ]
    own = read({"state": held["state"], "param_groups": groups}, parameters, **options)
    _check_moments(module, parameters, own, "tensorpar")
    return own


def _require_same_state(own: OptimizerState) -> None:
    """What ranks hold decides what they gather; if it differed they would wait for each other."""
    facts: dict[str, Any] = {"groups": [group["params"] for group in own.groups]}
    for name, held in [*own.state.items(), *own.of_whole_weights.items()]:
        facts[name] = facts.get(name, {}) | {
            kind: f"{x.dtype}{list(x.shape)}" if isinstance(x, torch.Tensor) else x
            for kind, x in held.items()
        }
    assert dist.group.WORLD is not None
    everyone = DeviceMesh.from_group(dist.group.WORLD, world().mesh.device_type)
    require_agreement(
        facts,
        everyone,
        "the ranks' optimizers hold different states; build them alike and step them together",
    )


def _under_own_names(module: nn.Module, given: OptimizerState) -> OptimizerState:
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


def _matched_groups(
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


def _recognised(module: nn.Module, given: OptimizerState) -> LayoutName:
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


def _check_layout(module: nn.Module, layout: str, known: tuple[str, ...]) -> None:
    if layout not in known:
        raise ValueError(f"layout = {layout!r}, required: one of {known}")
    if layout == "hf" and translate_functions(module):
        raise ValueError(
            "layout = 'hf' with modules that were replaced whole, required: 'tensorpar'; their "
            "translate functions say what becomes of parameters, not of an optimizer's groups"
        )


def _check_moments(
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


def _placed(value: Any, parameter: nn.Parameter) -> Any:
    """A full moment as this rank holds it, in memory of its own; a scalar as a copy."""
    if not is_moment(value):
        return value.clone() if isinstance(value, torch.Tensor) else value
    own = torch.empty_like(parameter, dtype=value.dtype)
    if isinstance(own, DTensor):
        value = distribute_tensor(
            value.to(own.device), own.device_mesh, own.placements, src_data_rank=None
        )
    return own.copy_(value)


def _is_scalar_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In memory as the shape says: fused kernels read moments without regard to strides."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
