"""A module's doors: where replicated activations enter a parallel region, and leave it.

On entering, the named forward arguments pass the copy region, once, so that the column layers
inside are purely local; and while training with dropout, the default generator is forked to this
rank's own stream. The fork ends at the module's row layer, whose output is replicated again, or at
the module's end where it has none.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import copy_region
from tensorpar.nn.linear import RowParallel
from tensorpar.parameters import mix_in
from tensorpar.random import Fork
from tensorpar.region import close_region, open_region


def check_arguments(module: nn.Module, enter: tuple[str, ...]) -> list[str]:
    """The names of the forward's arguments; AttributeError unless `enter` is among them."""
    names = list(inspect.signature(module.forward).parameters)
    if missing := [name for name in enter if name not in names]:
        raise AttributeError(
            f"enter = {missing} of {type(module).__name__}, required: arguments of its forward, "
            f"which has {names}"
        )
    return names


class Door:
    """Hooks that stand at the entrance and the exit of one module.

    Args:
        module: the module whose children were made parallel.
        enter: names of the forward arguments that the column layers read.
        mesh: the tp mesh.

    Raises:
        AttributeError: the module's forward has no argument of such a name.
    """

    def __init__(self, module: nn.Module, enter: tuple[str, ...], mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.fork = Fork()
        names = check_arguments(module, enter)
        self._places = [(names.index(name), name) for name in enter]
        self._dropouts = [
            m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)
        ]
        self._hang(module)

    def _hang(self, module: nn.Module) -> None:
        if hasattr(module, "gradient_checkpointing"):
            module.__dict__["_tensorpar_inner_door"] = self
            mix_in(module, BehindDoor)
        else:
            module.register_forward_pre_hook(self.open, with_kwargs=True)
            module.register_forward_hook(self.close, always_call=True)
        for child in module.modules():
            if isinstance(child, RowParallel):
                child.register_forward_hook(self.close)

    def open(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: copy regions on the named arguments, then the fork."""
        args_list, kwargs = list(args), dict(kwargs)
        for place, name in self._places:
            holder: Any = args_list if place < len(args_list) else kwargs
            key = place if place < len(args_list) else name
            value = args_list[place] if place < len(args_list) else kwargs.get(name)
            if isinstance(value, Tensor):
                holder[key] = copy_region(value, self.mesh)
        if self._places:
            open_region(self.mesh)
        if module.training and self._draws(module):
            self.fork.enter(self.mesh.get_local_rank())
        return tuple(args_list), kwargs

    def _draws(self, module: nn.Module) -> bool:
        """Whether dropout is on: a layer inside, or a number that the forward hands to a kernel."""
        numbers = (value for name, value in vars(module).items() if "dropout" in name)
        return any(dropout.p > 0 for dropout in self._dropouts) or any(
            isinstance(value, float) and value > 0 for value in numbers
        )

    def close(self, *_: object) -> None:
        """Forward hook: back to what all ranks share."""
        close_region()
        self.fork.leave()


class BehindDoor:
    """Mixed in front of a layer whose forward Transformers recomputes in backward.

    It recomputes the forward alone, without the layer's hooks, so the door is part of the forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, between the two sides of its door."""
        door: Door = self.__dict__["_tensorpar_inner_door"]
        args, kwargs = door.open(self, args, kwargs)  # type: ignore[arg-type]
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            door.close()
