"""A module's doors: where replicated activations enter a parallel region, and leave it.

On entering, the named forward arguments pass the copy region, once, so that the column layers
inside are purely local; attention masks that differ between heads are cut to this rank's; and
while training with dropout, the default generator is forked to this rank's own stream. The fork
ends at the module's row layer, whose output is replicated again, or at the module's end where it
has none.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import copy_region
from tensorpar.nn.linear import RowParallel
from tensorpar.partition import chunk_bounds
from tensorpar.random import Fork
from tensorpar.region import close_region, open_region

#: forward arguments `[batch, heads or 1, queries, keys]` of attention modules.
MASKS = ("attention_mask", "encoder_attention_mask")


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
        heads: how many attention heads the module has on all ranks together, if it has any.

    Raises:
        AttributeError: the module's forward has no argument of such a name.
    """

    def __init__(
        self,
        module: nn.Module,
        enter: tuple[str, ...],
        mesh: DeviceMesh,
        heads: int | None = None,
    ) -> None:
        self.mesh = mesh
        self.fork = Fork()
        self._heads = heads
        names = check_arguments(module, enter)
        self._places = [(names.index(name), name) for name in enter]
        self._masks = [(names.index(name), name) for name in MASKS if heads and name in names]
        self._dropouts = [
            m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)
        ]
        self._hang(module)

    def _hang(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.open, with_kwargs=True)
        module.register_forward_hook(self.close, always_call=True)
        for child in module.modules():
            if isinstance(child, RowParallel):
                child.register_forward_hook(self.close)

    def open(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook: copy regions on the named arguments, own heads' masks, the fork."""
        args_list, kwargs = list(args), dict(kwargs)
        for places, change in (
            (self._places, lambda x: copy_region(x, self.mesh)),
            (self._masks, self._own_heads),
        ):
            for place, name in places:
                holder: Any = args_list if place < len(args_list) else kwargs
                key = place if place < len(args_list) else name
                value = args_list[place] if place < len(args_list) else kwargs.get(name)
                if isinstance(value, Tensor):
                    holder[key] = change(value)
        if self._places:
            open_region(self.mesh)
        if module.training and self._draws(module):
            self.fork.enter(self.mesh.get_local_rank())
        return tuple(args_list), kwargs

    def _own_heads(self, mask: Tensor) -> Tensor:
        """This rank's heads of a mask that has all; a rank without a head pretends to have one."""
        heads = self._heads
        if heads is None or mask.ndim != 4 or mask.shape[1] != heads:
            return mask
        start, stop = chunk_bounds(heads, self.mesh.size(), self.mesh.get_local_rank())
        start = min(start, heads - 1)
        return mask[:, start : max(stop, start + 1)]

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
