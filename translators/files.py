"""Hugging Face folders in and out of a parallel model; each rank reads its own slices only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from tensorpar.families import FAMILIES
from tensorpar.gathering import annotated
from tensorpar.model import DistributedModel
from tensorpar.parameters import shard_dim
from tensorpar.pattern import Pattern
from tensorpar.replace import translate_functions
from tensorpar.styles import Layout

from .problems import refuse
from .safetensors_folder import Source, opened_folder, shape_of
from .slices import hf_shape, read_parts
from .table import table_of

S = TypeVar("S")

#: names that the first BERT checkpoints had, which Transformers mends when it loads them too.
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class Target:
    """One tensor of the model that is to be filled.

    Attributes:
        names: its keys; several if it is tied.
        tensor: a DTensor parameter, or a buffer.
        layout: from Hugging Face's axes to its own.
    """

    names: list[str]
    tensor: torch.Tensor
    layout: Layout


def load_hf(model: nn.Module, path: str | PathLike[str]) -> None:
    """Fill a parallel model from a folder of Hugging Face's; nothing is communicated.

    Args:
        model: made parallel, or a `DistributedModel`; all its weights are overwritten.
        path: a folder with `model.safetensors` or an index of many files, or such a file itself;
            keys may lack the base model's prefix, or have it in addition.

    Raises:
        ValueError: all keys that are missing, unknown or of the wrong shape, or a file that cannot
            be read. The model is unchanged then.
    """
    if isinstance(model, DistributedModel):
        model = model.get_module()
    targets = _targets(model)
    with opened_folder(path) as handles:
        sources = renamed(model, _translated(model, handles))
        chosen = {
            target.names[0]: next((name for name in target.names if name in sources), None)
            for target in targets
        }
        what = f"{path} does not fit the {type(model).__name__}"
        refuse(what, _problems(targets, chosen, sources))
        quiet = dist.is_initialized() and dist.get_rank() > 0
        for target in tqdm(targets, desc="loading", unit="tensor", disable=quiet):
            _fill(target, sources[str(chosen[target.names[0]])])


def save_hf(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write an ordinary Hugging Face folder; collective over all ranks, written by rank 0.

    Args:
        model: a parallel Transformers model, or a `DistributedModel` of one.
        path: the folder; made if absent.

    Raises:
        TimeoutError: a rank does not make this call in time; on all ranks that do.
        ValueError: the model has no `save_pretrained`.
    """
    save = getattr(model, "save_pretrained", None)
    if save is None:
        raise ValueError(
            f"model = a {type(model).__name__} without save_pretrained, required: a Transformers "
            "model; save the state_dict of others"
        )
    save(path)


def _targets(model: nn.Module) -> list[Target]:
    layouts = {name: layout for name, layout, _ in annotated(model)}
    by_identity: dict[int, Target] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        layout = layouts.get(name) or _as_it_is(tensor)
        by_identity.setdefault(id(tensor), Target([], tensor, layout)).names.append(name)
    return list(by_identity.values())


def _as_it_is(tensor: torch.Tensor) -> Layout:
    """The layout of a tensor that no plan has laid out: one axis per dim on both sides."""
    axes = [f"x{dim}" for dim in range(tensor.ndim)]
    dim = shard_dim(tensor)
    return Layout(
        Pattern(f"{' '.join(axes)} -> {' '.join(axes)}"), None if dim is None else axes[dim]
    )


def _translated(model: nn.Module, handles: Mapping[str, Source]) -> Mapping[str, Source]:
    """Through the functions of classes that were replaced whole; they want tensors, not handles."""
    functions = translate_functions(model)
    if functions:
        handles = {key: handle[...] for key, handle in handles.items()}
    for _, from_hf in functions:
        handles = from_hf(handles)
    return handles


def renamed(model: nn.Module, sources: Mapping[str, S]) -> dict[str, S]:
    """Hugging Face's keys under the model's own names, without what old versions kept.

    Args:
        model: the parallel model.
        sources: key to tensor or reader; keys may lack the base model's prefix, or have it in
            addition.
    """
    own = model.state_dict()
    family = getattr(getattr(model, "config", None), "model_type", None)
    table = table_of(family) if family in FAMILIES else None
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own_names = {}
    for key, source in sources.items():
        if table is None or not table.drops(key):
            new = key
            for old_name, new_name in _RENAMED.items():
                new = new.replace(old_name, new_name)
            names = (key, new, prefix + new, new.removeprefix(prefix))
            own_names[next((name for name in names if name in own), key)] = source
    return own_names


def _problems(
    targets: Iterable[Target], chosen: Mapping[str, str | None], sources: Mapping[str, Source]
) -> list[str]:
    lines, known = [], set()
    for target in targets:
        known.update(target.names)
        needed = tuple(hf_shape(target.layout, target.tensor.shape))
        name = chosen[target.names[0]]
        if name is None:
            lines.append(f"{target.names[0]} {needed} is missing")
        elif shape_of(sources[name]) != needed:
            lines.append(f"{name} has shape {shape_of(sources[name])}, required {needed}")
        if isinstance(target.tensor, DTensor) and target.tensor.device_mesh.ndim > 1:
            names = target.tensor.device_mesh.mesh_dim_names
            lines.append(f"{target.names[0]} is sharded over {names}; load before fully_shard")
    unknown = [name for name in sources if name not in known]
    return lines + [f"{name} {shape_of(sources[name])} is unknown" for name in unknown]


@torch.no_grad()
def _fill(target: Target, source: Source) -> None:
    tensor, ranks = target.tensor, (1, 0)
    if isinstance(tensor, DTensor):
        ranks = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    for place, values in read_parts(source, target.layout, tensor.shape, *ranks):
        local[place].copy_(values)
