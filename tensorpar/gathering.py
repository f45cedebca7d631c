"""Whole tensors out of a parallel model, and back in: what is saved, and what can be loaded.

Gathering is collective over all ranks that hold a part; it begins with a rendezvous, so that a
rank that never comes ends in an error and not in a hang.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tensorpar.parameters import stored_name
from tensorpar.rendezvous import rendezvous
from tensorpar.styles import Layout

TIMEOUT = timedelta(seconds=300)


def whole_tensors(tensors: Mapping[str, Any], *, keep: bool = True) -> Iterator[tuple[str, Any]]:
    """Every DTensor whole and on the CPU, one at a time; other values as they are. Collective.

    Args:
        tensors: name to value; names that share a tensor share the result.
        keep: False on ranks that only take part: they get None.
    """
    seen: dict[int, Any] = {}
    for name, value in tensors.items():
        if id(value) not in seen:
            whole = value.full_tensor().detach() if isinstance(value, DTensor) else value
            if isinstance(value, DTensor) and whole.device.type == "cpu":
                whole = whole.clone()  # a replica is the parameter itself, a gathered one is padded
            if isinstance(whole, torch.Tensor):
                whole = whole.detach().cpu() if keep else None
            seen[id(value)] = whole
        yield name, seen[id(value)]


def whole_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter of a parallel model: full, plain, in Hugging Face's layout. Collective."""
    own: Any = module._parameters[name]
    full = whole(own, module.__dict__.get("layouts", {}).get(name))
    return nn.Parameter(full, requires_grad=own.requires_grad)


def whole(tensor: Any, layout: Layout | None) -> torch.Tensor:
    """A DTensor full, plain, dense and in Hugging Face's layout. Collective over its mesh.

    Args:
        tensor: a parameter, or what has its shape and placements.
        layout: the parameter's; None where it is as Hugging Face has it.
    """
    full: torch.Tensor = tensor.detach().full_tensor()
    if layout is not None:
        full = layout.pattern.inverse.apply(full)
    # a replica is the parameter itself, and what is gathered of uneven shards is padded
    return full.clone(memory_format=torch.contiguous_format)


def gathered_state_dict(
    model: nn.Module, *, to_rank0: bool, call: str, timeout: timedelta = TIMEOUT
) -> dict[str, Any]:
    """The state dict in tensorpar layout, full and plain; collective over all ranks.

    Raises:
        TimeoutError: a rank does not make this call in time; on all ranks that do.
    """
    present = rendezvous(call, timeout)
    keep = not to_rank0 or present == 0
    pairs = whole_tensors(model.state_dict(keep_vars=True), keep=keep)
    return {name: value for name, value in pairs if keep}


def hf_layout(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A full state dict of `model` from tensorpar layout to that which Hugging Face saves."""
    out = dict(state_dict)
    for name, layout, _ in annotated(model):
        if name in out:
            out[name] = layout.pattern.inverse.apply(out[name])
    return out


def tensorpar_layout(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `hf_layout`."""
    out = dict(state_dict)
    for name, layout, sizes in annotated(model):
        if name in out:
            out[name] = layout.pattern.apply(out[name], **sizes)
    return out


def annotated(model: nn.Module) -> Iterator[tuple[str, Any, Mapping[str, int]]]:
    """Name in `state_dict`, `Layout` and axis sizes of every parameter that a plan has laid out."""
    for path, module in model.named_modules(remove_duplicate=False):
        layouts = module.__dict__.get("layouts")
        for name in layouts or ():
            if module._parameters.get(name) is not None:
                key = f"{path}.{name}" if path else name
                yield stored_name(key), layouts[name], module.__dict__["axis_sizes"]


def load_full(model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
    """Copy full tensors in tensorpar layout into the model's shards; nothing is communicated.

    Args:
        model: the parallel model.
        state_dict: name to full tensor, or to a DTensor placed as the parameter is.
        strict: refuse missing and unknown keys; shapes are always checked.

    Raises:
        ValueError: all keys that are missing, unknown or of the wrong shape, with their shapes.
            The model is unchanged then.
    """
    own = model.state_dict(keep_vars=True)
    check_keys(own, state_dict, strict=strict)
    with torch.no_grad():
        for name in own.keys() & state_dict.keys():
            target, value = own[name], state_dict[name]
            if isinstance(target, DTensor) and not isinstance(value, DTensor):
                value = placed_as(target, torch.as_tensor(value))
            target.copy_(value)


def placed_as(parameter: DTensor, full: torch.Tensor) -> torch.Tensor:
    """A DTensor of this rank's part of `full`, placed as `parameter` is; no communication."""
    placed: torch.Tensor = distribute_tensor(
        full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    return placed


def own_part(
    parameter: Any, full: torch.Tensor, layout: Layout | None, sizes: Mapping[str, int]
) -> torch.Tensor:
    """The inverse of `whole`: placed as `parameter` is, in memory of its own; no communication.

    Args:
        parameter: on its mesh.
        full: plain, in Hugging Face's layout, of any dtype.
        layout: the parameter's, or None.
        sizes: of the layout's axes.
    """
    if layout is not None:
        full = layout.pattern.apply(full, **sizes)
    return torch.empty_like(parameter, dtype=full.dtype).copy_(placed_as(parameter, full))


def check_keys(own: Mapping[str, torch.Tensor], given: Mapping[str, Any], *, strict: bool) -> None:
    """Raise ValueError listing everything in `given` that does not fit `own`."""
    tied = {id(own[name]) for name in own.keys() & given.keys()}
    missing = [name for name in own if name not in given and id(own[name]) not in tied]
    wrong = [
        f"{name} has shape {tuple(given[name].shape)}, required {tuple(own[name].shape)}"
        for name in own
        if name in given and tuple(given[name].shape) != tuple(own[name].shape)
    ]
    problems = wrong
    if strict:
        problems = [f"{name} {tuple(own[name].shape)} is missing" for name in missing] + wrong
        unknown = [name for name in given if name not in own]
        problems += [f"{name} {tuple(given[name].shape)} is unknown" for name in unknown]
    if problems:
        raise ValueError(
            f"the state dict does not fit the model, {len(problems)} keys: " + "; ".join(problems)
        )
