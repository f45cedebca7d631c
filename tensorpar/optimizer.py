"""The state of an optimizer over a parallel model, whole and in Hugging Face's layout, and back.

So a run moves between one process and any degree, in both directions, with its moments: what one
process's optimizer saved is loaded here, and what is gathered here one process's optimizer loads.

`torch.distributed.checkpoint.state_dict` is not used, for two reasons found by trying: reading the
state of an optimizer that has not stepped makes it step, so that its first real step counts as the
second; and loading a full dict sends every tensor from rank 0, though all ranks have it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
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
from tensorpar.moments import OptimizerState, has_names, is_moment, read
from tensorpar.optimizer_fit import (
    LayoutName,
    Optimizer,
    matched_groups,
    own_parameters,
    recognised_layout,
    require_layout,
    require_shapes,
    under_own_names,
)
from tensorpar.parameters import local
from tensorpar.rendezvous import rendezvous
from tensorpar.whole_weights import IsApart, tells_apart


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
    require_layout(module, layout, ("hf", "tensorpar"))
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
    parameters = own_parameters(module, optimizer)
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
    parameters = own_parameters(module, optimizer)
    names = None if has_names(state_dict) else list(parameters)
    given = read(state_dict, names, is_apart=tells_apart(module, optimizer))
    given.require_plain()
    given = under_own_names(module, given)
    groups = matched_groups(optimizer, parameters, given)
    if layout == "auto":
        layout = recognised_layout(module, given)
    require_layout(module, layout, ("auto", "hf", "tensorpar"))
    require_shapes(module, parameters, given, layout)
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


def _own_state(module: nn.Module, optimizer: Optimizer, **options: IsApart) -> OptimizerState:
    """The optimizer's state as it is; its moments are DTensors."""
    parameters = own_parameters(module, optimizer)
    held = optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in held["param_groups"]
    ]
    own = read({"state": held["state"], "param_groups": groups}, parameters, **options)
    require_shapes(module, parameters, own, "tensorpar")
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
