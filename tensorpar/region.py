"""Whether the code that now runs is inside a parallel region, and what that means for parameters.

A region opens at a module's door or at a column layer's output, and closes at the row layer that
sums it up. Inside, ranks compute different things, so a replicated parameter used there (a norm on
the heads, say) sees a part of its gradient on each rank: the parts are summed in backward. The same
holds between regions while the sequence is split, where each rank sees some of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tensorpar.collectives import copy_region, copy_together
from tensorpar.parameters import local, shard_dim
from tensorpar.rows import current_rows

_open: ContextVar[DeviceMesh | None] = ContextVar("parallel_region", default=None)


def open_region(mesh: DeviceMesh) -> None:
    """From here on, activations belong to this rank alone."""
    _open.set(mesh)


def close_region() -> None:
    """From here on, activations are the same on all ranks, or rows of one split sequence."""
    _open.set(None)


def inside_region() -> bool:
    """Whether activations are computed from this rank's shards alone."""
    return _open.get() is not None


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter as a plain local tensor whose gradient is whole, wherever it is used."""
    if not torch.is_grad_enabled():
        return local(parameter)
    if (copy := _copies.get().get(id(parameter))) is not None:
        return copy
    mesh, rows = _open.get(), current_rows()
    if mesh is None and rows is not None:
        mesh = rows.mesh
    if mesh is None or shard_dim(parameter) is not None:
        return local(parameter)
    return copy_region(local(parameter), mesh)


#: parameters by identity, with the copies whose gradients are summed together.
_copies: ContextVar[Mapping[int, torch.Tensor]] = ContextVar("copies", default=MappingProxyType({}))


@contextmanager
def summing_together(module: nn.Module) -> Iterator[None]:
    """Within a module's forward on rows: its replicated parameters' gradients share an all-reduce.

    What FSDP2 has not gathered yet, for a module inside that it was given by itself, is summed
    where it is used.
    """
    rows = current_rows()
    if rows is None or not torch.is_grad_enabled():
        yield
        return
    shared = [
        p
        for p in module.parameters()
        if isinstance(p, DTensor)
        and p.requires_grad
        and p.device_mesh.ndim == 1
        and shard_dim(p) is None
    ]
    copies = copy_together([local(p) for p in shared], rows.mesh)
    token = _copies.set({id(p): copy for p, copy in zip(shared, copies, strict=True)})
    try:
        yield
    finally:
        _copies.reset(token)


_computing: ContextVar[bool] = ContextVar("computing", default=False)


def begin_forward() -> Token[bool]:
    """From here on replicated parameters read plain, from outside their module too."""
    return _computing.set(True)


def end_forward(token: Token[bool]) -> None:
    """Back to what was before `begin_forward`."""
    _computing.reset(token)


def plain_shelf(shelf: dict[str, Any]) -> dict[str, Any]:
    """A module's own parameters as its forward sees them."""
    return {name: None if p is None else plain(p) for name, p in shelf.items()}


class LocalParameters:
    """Mixed into the class of a module with replicated parameters: its forward sees them plain.

    The module stays an instance of its own class; only while its forward runs do its parameters
    read as local tensors. While the model's runs, so they do for other modules, which may use them
    in a forward of theirs (`torch.nn.MultiheadAttention` reads its child's).
    """

    _parameters: dict[str, torch.Tensor | None]

    def forward(self, *args: object, **kwargs: object) -> object:
        """The class's own forward, on local tensors."""
        held, shelf = self.__dict__, self._parameters
        seen = plain_shelf(shelf)
        held["_parameters"] = seen
        held.update(seen)  # found there, no `__getattr__` runs
        token = None if _computing.get() else begin_forward()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            if token is not None:
                end_forward(token)
            held["_parameters"] = shelf
            for name in seen:
                held.pop(name, None)

    def __getattr__(self, name: str) -> Any:
        """torch looks parameters up here."""
        value = super().__getattr__(name)  # type: ignore[misc]
        return plain(value) if isinstance(value, DTensor) and _computing.get() else value
