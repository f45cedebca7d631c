"""A module's doors: where replicated activations enter a parallel region, and leave it.

On entering, the named forward arguments pass the copy region (of a split sequence, they are
gathered), once, so that the column layers inside are purely local; attention masks that differ
between heads are cut to this rank's. From a column layer's output on, while training with dropout,
ranks compute different things: the default generator is forked to this rank's own stream, or under
`reproducible_dropout` whole masks are drawn. That ends at the module's row layer, whose output is
replicated or rows of a sequence again, or at the module's end where it has none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar import hf_compat
from tensorpar.guard import guarding, note_activation
from tensorpar.nn.linear import ColumnParallel, RowParallel
from tensorpar.parameters import mix_in
from tensorpar.partition import chunk_bounds
from tensorpar.random import Fork
from tensorpar.region import close_region, inside_region, open_region
from tensorpar.reproducible import Share, WholeMasks, refuse_unknown_order
from tensorpar.rows import current_rows, enter_region

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


@dataclass(frozen=True)
class Randomness:
    """How dropout within a module draws.

    Attributes:
        heads: the global number of its heads, if it has any.
        reproducible: as one process does, rather than from each rank's own stream.
    """

    heads: int | None = None
    reproducible: bool = False


class Door:
    """Stands at the entrance and the exit of one module.

    Args:
        module: the module whose children were made parallel.
        enter: names of the forward arguments that the column layers read.
        mesh: the tp mesh.
        randomness: how its dropout draws.

    Raises:
        AttributeError: the module's forward has no argument of such a name.
    """

    def __init__(
        self,
        module: nn.Module,
        enter: tuple[str, ...],
        mesh: DeviceMesh,
        randomness: Randomness,
    ) -> None:
        self._name = type(module).__name__
        self.mesh = mesh
        self.randomness = randomness
        self.fork = Fork()
        self._forks = False
        self._masks: list[WholeMasks] = []
        self._arguments = names = check_arguments(module, enter)
        self._places = [(names.index(name), name) for name in enter]
        has_heads = randomness.heads is not None
        self._seen = [(names.index(name), name) for name in MASKS if has_heads and name in names]
        rows = any(isinstance(child, RowParallel) for child in module.modules())
        self._encloses_region = rows or bool(enter)
        self._dropouts = [
            m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd)
        ]
        self._hang(module)

    def _hang(self, module: nn.Module) -> None:
        module.__dict__["_tensorpar_module_door"] = self
        mix_in(module, BehindDoor)
        for child in module.modules():
            if isinstance(child, ColumnParallel | RowParallel):
                child.doors = (*child.doors, self)

    def open(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The forward's arguments: the named ones through the region, of masks the own heads."""
        args_list = list(args)
        # entering is the identity where there is neither a gradient to sum nor a row to gather
        enters = torch.is_grad_enabled() or current_rows() is not None
        entering = self._places if enters else ()
        for places, change in ((entering, self._entered), (self._seen, self._own_heads)):
            for place, name in places:
                holder: Any = args_list if place < len(args_list) else kwargs
                key = place if place < len(args_list) else name
                value = args_list[place] if place < len(args_list) else kwargs.get(name)
                if isinstance(value, Tensor):
                    holder[key] = change(value)
        if guarding():
            self._note(module, {**dict(zip(self._arguments, args_list, strict=False)), **kwargs})
        if self._places:
            open_region(self.mesh)
        return args_list, kwargs

    def _entered(self, x: Tensor) -> Tensor:
        return enter_region(x, self.mesh)

    def _note(self, module: nn.Module, given: dict[str, Any]) -> None:
        """Tell the guard what enters; without named arguments, all that is replicated here."""
        is_common = not inside_region() and current_rows() is None
        names = [name for _, name in self._places] or (list(given) if is_common else [])
        for name in names:
            if isinstance(given.get(name), Tensor):
                note_activation(module, name, given[name])

    @contextmanager
    def drawing(self, module: nn.Module) -> Iterator[None]:
        """Within: the training forward of `module`, or its recomputation.

        Raises:
            ValueError: its attention draws in an order that cannot be matched.
        """
        if self.mesh.size() == 1:
            yield
        elif self.randomness.reproducible:
            with self._whole_masks(module) as masks:
                self._masks.append(masks)
                try:
                    yield
                finally:
                    self._masks.pop()
        else:
            self._forks = self._draws(module)
            try:
                yield
            finally:
                self._forks = False
                self.fork.leave()

    def _whole_masks(self, module: nn.Module) -> WholeMasks:
        implementation = hf_compat.attention_implementation(module)
        refuse_unknown_order(module, implementation, self.mesh.device_type)
        heads = self.randomness.heads
        share = None if heads is None else Share.of(heads, self.mesh, at_least_one=True)
        return WholeMasks(self._name, share)

    def _own_heads(self, mask: Tensor) -> Tensor:
        """This rank's heads of a mask that has all; a rank without a head pretends to have one."""
        heads = self.randomness.heads
        # as it came where all ranks see the same: layers share what they derive from one mask
        if heads in (None, 1) or mask.ndim != 4 or mask.shape[1] != heads:
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

    def part(self, column: nn.Module) -> None:
        """After a column layer: from its output on, ranks have parts of their own."""
        if self._masks:
            self._masks[-1].after_column(column)
        if self._forks:
            self.fork.enter(self.mesh.get_local_rank())

    def join(self) -> None:
        """After a row layer: back to what all ranks share."""
        self.fork.leave()
        if self._masks:
            self._masks[-1].before_row()

    def close(self) -> None:
        """After the forward, and after an exception."""
        if self._encloses_region:
            close_region()


class BehindDoor:
    """Mixed into the class of a module with a door.

    A forward and not hooks, since Transformers recomputes checkpointed layers without theirs, and
    each hook costs as much time as a layer's smallest kernel.
    """

    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """The class's own forward, on what comes through the door; its draws the door decides."""
        door: Door = self.__dict__["_tensorpar_module_door"]
        try:
            entered, kwargs = door.open(self, args, kwargs)  # type: ignore[arg-type]
            if not self.training:
                return super().forward(*entered, **kwargs)  # type: ignore[misc]
            with door.drawing(self):  # type: ignore[arg-type]
                return super().forward(*entered, **kwargs)  # type: ignore[misc]
        finally:
            door.close()
