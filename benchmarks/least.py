"""The least that a step can take: its arithmetic and its collectives, and nothing between them.

A step of tensorpar is watched once. What no system can leave out is then repeated alone, on the
same tensors: matrix products, fused attention, the optimizer's kernel, collectives. No norm, no
activation, no dropout, no loss, no autograd, no Python of a module. What the ranks of this machine
take for that, running together, bounds every system that shares out the same products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contest import Seat
from models import Shape
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LEAST = "least work"
KERNELS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_fused_adamw_",
)
MESSAGES = (torch.ops.c10d.recv_.default, torch.ops.c10d.send.default)
#: a call that ended, to be made again.
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Recorder(TorchDispatchMode):
    """Keeps the calls of `KERNELS` and of every collective, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func.namespace == "c10d" or func.overloadpacket.__name__ in KERNELS:
            given = tree_map_only(DTensor, DTensor.to_local, (args, kwargs))
            self.calls.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, given)))
        return func(*args, **kwargs)


def least(
    step_of_system: Callable[[str, Shape, Seat], Callable[[], Any]],
    shape: Shape,
    seat: Seat,
    system: str = "tensorpar",
) -> Callable[[], None]:
    """What of a system's step, forward or decoding must be done, to be repeated."""
    step = step_of_system(system, shape, seat)
    with Recorder() as seen:
        step()

    @torch.no_grad()
    def again() -> None:
        pending: list[Any] = []
        for func, args, kwargs in seen.calls:
            if func not in MESSAGES:  # messages that follow each other are one exchange
                wait_for(pending)
            results = tree_leaves(func(*args, **kwargs))
            pending += [result for result in results if hasattr(result, "wait")]
        wait_for(pending)

    return again


def wait_for(pending: list[Any]) -> None:
    """Of calls that are under way; none is left."""
    for one in pending:
        one.wait()
    pending.clear()
