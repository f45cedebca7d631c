"""Tensor-parallel ranks that are each fed a batch of their own: `prescaled_batch=False`.

At the model's door the ranks' batches are joined, so that all compute the same; on the way out
each rank is handed its own rows. A loss is that of the joined batch, on every rank; losses that the
ranks compute from their own rows train on their mean, as data-parallel ranks' do. Logits that a
training step leaves sharded (a DTensor) are those of the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree


class OwnBatches:
    """Joins batches along dim 0 before a forward and parts its outputs after.

    Args:
        mesh: the tp mesh.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def run(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `model` on the joined batch.

        Raises:
            ValueError: the ranks' tensors differ in number, dtype or shape besides dim 0.
        """
        if self.mesh.size() == 1:
            return model(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.ndim
        ]
        sizes = self._batch_sizes([leaves[i] for i in places])
        for i in places:
            leaves[i] = self.join(leaves[i], sizes)
        joined_args, joined_kwargs = pytree.tree_unflatten(leaves, spec)
        output = model(*joined_args, **joined_kwargs)
        return _map_tensors(output, lambda x: self._own_rows(x, sizes))

    def _own_rows(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        if isinstance(x, DTensor) or not x.ndim or x.shape[0] != sum(sizes):
            return x
        return _OwnRows.apply(x, sizes, self)

    def _batch_sizes(self, tensors: list[torch.Tensor]) -> list[int]:
        own = [(str(x.dtype), tuple(x.shape[1:]), x.shape[0]) for x in tensors]
        everyone: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(everyone, own, group=self.mesh.get_group())
        kinds = {tuple(entry[:2] for entry in one) for one in everyone}
        rows = [{entry[2] for entry in one} for one in everyone]
        if len(kinds) > 1 or any(len(counts) != 1 for counts in rows):
            raise ValueError(
                f"batches of the tp ranks = {everyone}, required: the same tensors, alike but for "
                "dim 0; pad them to one length, or set prescaled_batch=True and feed all alike"
            )
        return [next(iter(counts)) for counts in rows]

    def join(self, own: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """All-gather with uneven rows, padded to the largest while they travel."""
        padded = own.new_zeros((max(sizes), *own.shape[1:]))
        padded[: own.shape[0]] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.mesh.get_group())
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: list[int], batches: OwnBatches) -> torch.Tensor:
        ctx.sizes, ctx.batches = sizes, batches
        rank = batches.mesh.get_local_rank()
        return x.narrow(0, sum(sizes[:rank]), sizes[rank]).clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.batches.join(grad, ctx.sizes) / len(ctx.sizes), None, None


def _map_tensors(output: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Over tensors in mappings (Transformers' outputs among them), tuples and lists."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, dict):
        mapped = {key: _map_tensors(value, function) for key, value in output.items()}
        return type(output)(**mapped)
    if isinstance(output, tuple | list):
        return type(output)(_map_tensors(value, function) for value in output)
    return output
