"""Whether the code that now runs is inside a parallel region, and what that means for parameters.

A region opens at a module's door or at a column layer's output, and closes at the row layer that
sums it up. Inside, ranks compute different things, so a replicated parameter used there (a norm on
the heads, say) sees a part of its gradient on each rank: the parts are summed in backward.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import copy_region
from tensorpar.parameters import local, shard_dim

_open: ContextVar[DeviceMesh | None] = ContextVar("parallel_region", default=None)


def open_region(mesh: DeviceMesh) -> None:
    """From here on, activations belong to this rank alone."""
    _open.set(mesh)


def close_region() -> None:
    """From here on, activations are the same on all ranks."""
    _open.set(None)


def inside_region() -> bool:
    """Whether activations belong to this rank alone."""
    return _open.get() is not None


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter as a plain local tensor whose gradient is whole, wherever it is used."""
    mesh = _open.get()
    if mesh is None or shard_dim(parameter) is not None:
        return local(parameter)
    return copy_region(local(parameter), mesh)


class LocalParameters:
    """Mixed into the class of a module with replicated parameters: its forward sees them plain.

    The module stays an instance of its own class; only while its forward runs do its parameters
    read as local tensors.
    """

    _parameters: dict[str, torch.Tensor | None]

    def forward(self, *args: object, **kwargs: object) -> object:
        """The class's own forward, on local tensors."""
        shelf = self._parameters
        seen = {name: None if p is None else plain(p) for name, p in shelf.items()}
        self.__dict__["_parameters"] = seen
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__["_parameters"] = shelf
