"""Data parallelism around a tensor-parallel model, by torch's FSDP2 on the mesh's `dp` axis.

Each block is a unit of its own, so that its gradients travel while the backward of the block
before it runs. `"fsdp"` shards parameters, gradients and optimizer states over `dp` as well;
`"replicate"` keeps them whole there and averages gradients. Both keep every parameter a DTensor.

FSDP2 is imported where it is used: it is a quarter of what tensorpar's import would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_module_registration_hook

from tensorpar.agreement import require_agreement
from tensorpar.parameters import shard_dim
from tensorpar.partition import chunk_sizes

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

Kind = Literal["fsdp", "replicate"]
#: one row in so many may be padding: cutting dim 0 takes no copies around the collectives.
MOST_PADDING = 16


@dataclass(frozen=True)
class DataParallel:
    """How data-parallel ranks share a model.

    Args:
        kind: `"fsdp"` or `"replicate"`.
        mixed_precision: the dtypes of parameters in forward and of reduced gradients; the
            parameters that the optimizer sees keep their own dtype.
        reshard_after_forward: for `"fsdp"`, whether a block's parameters are freed until backward.
        cpu_offload: keep parameters, gradients and optimizer states in host memory.

    Raises:
        ValueError: `kind` is neither.
    """

    kind: Kind
    mixed_precision: MixedPrecisionPolicy | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"data_parallel = {self.kind!r}, required: one of {list(get_args(Kind))}, or None"
            )

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Hand a tensor-parallel model to torch, in place, block by block.

        Args:
            model: all its parameters are DTensors on the tp mesh.
            mesh: the dp mesh.
        """
        for unit in [*_blocks(model), model]:
            self._wrap(unit, mesh)

    def _wrap(self, unit: nn.Module, mesh: DeviceMesh) -> None:
        from torch.distributed._composable.replicate_with_fsdp import replicate
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": self.mixed_precision or MixedPrecisionPolicy(),
            "offload_policy": host if self.cpu_offload else OffloadPolicy(),
        }
        if self.kind == "fsdp":
            options["shard_placement_fn"] = partial(placement_over, size=mesh.size())
            fully_shard(unit, reshard_after_forward=self.reshard_after_forward, **options)
        else:
            replicate(unit, **options)


def placement_over(parameter: nn.Parameter, size: int) -> Shard | None:
    """Where FSDP2 cuts a parameter; None for its rule, which is dim 0, padded.

    A first dim as short as the 3 of fused q|k|v, or a rank's few heads, would leave most of `size`
    data-parallel ranks without a part of it. FSDP2 cuts other dims where they divide, and where no
    tensor-parallel rank's shard is empty.

    Args:
        parameter: on the tp mesh.
        size: of the dp mesh.
    """
    shape, sharded = list(parameter.shape), shard_dim(parameter)
    if isinstance(parameter, DTensor) and sharded is not None:
        sizes = chunk_sizes(shape[sharded], parameter.device_mesh.size())
        if not sizes[-1]:
            return None
        shape[sharded] = sizes[0]  # of all ranks, which must decide alike
    if not shape or -shape[0] % size * MOST_PADDING <= shape[0]:
        return None
    even = [d for d in range(1, len(shape)) if d != sharded and shape[d] % size == 0]
    return Shard(max(even, key=shape.__getitem__)) if even else None


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of module lists that share no parameter with the rest of the model."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(module, nn.ModuleList) and _stands_alone(child, holders):
                yield child
            else:
                yield from visit(child)

    return visit(model)


def _stands_alone(module: nn.Module, holders: dict[int, int]) -> bool:
    own = [id(p) for inner in module.modules() for p in inner._parameters.values() if p is not None]
    return bool(own) and all(holders[key] == own.count(key) for key in own)


@contextmanager
def without_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Within: gradients of a data-parallel model are accumulated, not reduced."""
    from torch.distributed.fsdp import FSDPModule

    units = [model] if isinstance(model, FSDPModule) else []
    for unit in units:
        unit.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_requires_gradient_sync(True)


def require_even_batches(given: dict[str, Any], mesh: DeviceMesh) -> None:
    """Raise on all data-parallel ranks unless their batches have the same number of rows.

    Gradients are averaged over ranks, which is the mean over rows only then.

    Raises:
        ValueError: the numbers of rows differ.
    """
    rows = {
        f"rows of {name}": value.shape[0]
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    require_agreement(
        rows,
        mesh,
        "data-parallel ranks were fed batches of different sizes, and averaging gradients would "
        "not give the mean over rows; pass drop_last=True to the loader, or pad the last batch",
    )


def _refuse_classic_ddp(parent: nn.Module, _name: str, child: nn.Module | None) -> None:
    """Classic DDP would overwrite each rank's shard by the first rank's, without an error."""
    if child is None or not isinstance(parent, nn.parallel.DistributedDataParallel):
        return
    if any(isinstance(parameter, DTensor) for parameter in child.parameters()):
        raise ValueError(
            f"DistributedDataParallel of a tensor-parallel {type(child).__name__}, required: "
            'tensorpar.DistributedModel(model, data_parallel="replicate") or '
            "torch.distributed.fsdp.fully_shard(model, mesh=tensorpar.dp_mesh()); in place of "
            "Transformers' Trainer and accelerate's Accelerator, those of tensorpar.trainer"
        )


_hook: Callable[..., None] = _refuse_classic_ddp
register_module_module_registration_hook(_hook)
