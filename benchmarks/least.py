"""The least that a step can take: its arithmetic and its collectives, and nothing between them.

A step of tensorpar is watched once, and calls of it are then made again: without Python of modules,
without autograd. What the ranks of this machine take for that, running together, is a bound.

* `least work`: what no system can leave out that shares out the same products: these, fused
  attention, the optimizer's kernel, collectives. No norm, no activation, no dropout, no loss.
* `kernels alone`: every operation of the step, those included that Transformers' modules ask for;
  what tensorpar takes longer than this is Python's and autograd's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from contest import Seat
from models import Shape
from torch import fx
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tensorpar.paging import empty_in_large_pages

LEAST, KERNELS = "least work", "kernels alone"
PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_fused_adamw_",
)


class Recorder(TorchDispatchMode):
    """Writes down collectives and operations, each with what those before have made for it.

    A tensor is known by its memory, since autograd hands on others that share it; what was made is
    kept until the end, lest its memory is used again. What is under way is waited for when the step
    has used its memory.

    Args:
        bound: `LEAST` or `KERNELS`.
    """

    def __init__(self, bound: str) -> None:
        super().__init__()
        self._bound = bound
        self._root, self._graph = torch.nn.Module(), fx.Graph()
        self._made: dict[Any, tuple[fx.Node, torch.Tensor]] = {}
        self._under_way: list[tuple[fx.Node, set[int]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes back with local tensors
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        used = {storage_of(x) for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        if not func.is_view:
            self._wait_for(used)
        counts = self._bound == KERNELS or func.overloadpacket.__name__ in PRODUCTS
        if counts or func.namespace == "c10d":
            again = empty if func is torch.ops.aten.empty.memory_format else func
            call = self._graph.call_function(again, *tree_map(self._given, (args, kwargs)))
            self._note(call, result, used)
        return result

    def replay(self) -> Callable[[], None]:
        """Makes the calls again."""
        self._wait_for(None)
        self._graph.output(None)
        return torch.no_grad()(fx.GraphModule(self._root, self._graph))

    def _wait_for(self, used: set[int] | None) -> None:
        for one in list(self._under_way):
            work, memory = one
            if used is None or used & memory:
                self._graph.call_method("wait", (work,))
                self._under_way.remove(one)

    def _given(self, value: Any) -> Any:
        """The node that makes an argument; what code cannot be written of is held by a module."""
        if is_tensor(value) and (made := self._made.get(identity(value))):
            return made[0]
        if not isinstance(value, torch.Tensor | torch.ScriptObject | torch.Generator):
            return value
        name = f"held_{len(self._graph.nodes)}"
        setattr(self._root, name, value.detach() if is_tensor(value) else value)
        return self._graph.get_attr(name)

    def _note(self, node: fx.Node, result: Any, used: set[int]) -> None:
        if isinstance(result, list | tuple):
            for place, part in enumerate(result):
                self._note(self._graph.call_function(operator.getitem, (node, place)), part, used)
        elif is_tensor(result):
            self._made[identity(result)] = node, result
        elif hasattr(result, "wait"):
            self._under_way.append((node, used))


def empty(shape: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    """In large pages, which tensorpar asks for outside of what is recorded."""
    return empty_in_large_pages(shape, dtype or torch.get_default_dtype())


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def identity(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same part of one memory."""
    return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def least(
    step_of_system: Callable[[str, Shape, Seat], Callable[[], Any]],
    shape: Shape,
    seat: Seat,
    system: str = "tensorpar",
    bound: str = LEAST,
) -> Callable[[], None]:
    """What of a system's step, forward or decoding must be done, to be repeated."""
    step = step_of_system(system, shape, seat)
    step()  # the first makes the optimizer's state
    with Recorder(bound) as seen:
        step()
    return seen.replay()
