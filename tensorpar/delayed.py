"""Delayed initialisation: parameters born on meta, each rank filling only its own shard.

The distributions are those of the model's own initialiser, which is run on the local shards under
this rank's random stream; what is replicated is then taken from the first rank. No rank ever
holds a full copy of a sharded parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from tensorpar import hf_compat
from tensorpar.nn.vocabulary import VocabParallel
from tensorpar.parameters import shard_dim
from tensorpar.random import Fork


class EmptyOnMeta(TorchFunctionMode):
    """Within: what `torch.empty` would leave uninitialised is made on the meta device.

    Weights are made so, in torch's and Transformers' layers; buffers, which hold values from the
    start, are not, and so are not lost.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def stays_on_meta() -> bool:
    """Whether the caller builds under `torch.device("meta")` and wants no storage at all."""
    return torch.get_default_device().type == "meta"


def fill(model: nn.Module, mesh: DeviceMesh, fresh: Sequence[nn.Parameter]) -> None:
    """Give initial values to parameters that were born on meta and have storage now.

    Values that other parameters of the same model already have are drawn anew too, since
    Transformers' initialiser visits whole modules.

    Raises:
        ValueError: such a parameter is in no Transformers model; torch's own layers scale their
            initial values with their full sizes, which a shard does not show.
    """
    if not fresh:
        return
    models = _outermost_models(model)
    covered = {id(p) for inner in models for p in inner.parameters()}
    if any(id(parameter) not in covered for parameter in fresh):
        raise ValueError(
            "delayed_parameter_initialization = True outside any Transformers model, "
            "required: a model with Transformers' initialiser; build this one without the option"
        )
    fork = Fork()
    fork.enter(mesh.get_local_rank())
    try:
        with torch.no_grad(), _plain_shards(model):
            for inner in models:
                hf_compat.initialize_weights(inner)
    finally:
        fork.leave()
    for parameter in model.parameters():
        if mesh.size() > 1 and shard_dim(parameter) is None:
            dist.broadcast(_shard(parameter), group=mesh.get_group(), group_src=0)


def _outermost_models(module: nn.Module) -> list[nn.Module]:
    if hf_compat.is_model(module):
        return [module]
    return [model for child in module.children() for model in _outermost_models(child)]


def _shard(parameter: torch.Tensor) -> torch.Tensor:
    plain = parameter.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


@contextmanager
def _plain_shards(model: nn.Module) -> Iterator[None]:
    """Within: parameters read as this rank's plain shards, padding rows are where they are held."""
    shelves = {module: module._parameters for module in model.modules()}
    embeddings = [module for module in shelves if isinstance(module, VocabParallel)]
    paddings = {module: module.padding_idx for module in embeddings}
    for module, shelf in shelves.items():
        plain = {name: None if p is None else _shard(p) for name, p in shelf.items()}
        module.__dict__["_parameters"] = plain
    for module in embeddings:
        module.padding_idx = module.local_padding_idx()
    try:
        yield
    finally:
        for module, shelf in shelves.items():
            module.__dict__["_parameters"] = shelf
        for module, padding in paddings.items():
            module.padding_idx = padding
