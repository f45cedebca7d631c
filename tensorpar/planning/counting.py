"""What a piece of code sends, keeps for backward and holds at once; for real and fake tensors."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tensorpar.messages import GATHERING
from tensorpar.parameters import local

#: the module that asks for a collective, to what it is for; the innermost one on the stack tells.
ASKED_BY = {
    "tensorpar.agreement": "batch check",
    "tensorpar.nn.cross_entropy": "loss",
    "torch.distributed.fsdp": "data parallel",
}


@dataclass(frozen=True)
class Sent:
    """Collectives of a kind.

    Attributes:
        num_calls: how many.
        num_bytes: of the whole tensors that they reduce or assemble, on one rank; of messages
            what arrives.
    """

    num_calls: int = 0
    num_bytes: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.num_calls + other.num_calls, self.num_bytes + other.num_bytes)


class Traffic(TorchDispatchMode):
    """Counts collectives, by what they do and what for.

    Attributes:
        sent: by name, such as `"all-reduce forward"` or `"all-gather data parallel"`.
        phase: what a tensor-parallel region's collectives are counted under.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, Sent] = {}
        self.phase = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes back with local tensors
        if func.namespace in ("c10d", "_c10d_functional") and (kind := _kind(func.__name__, args)):
            name = f"{kind} {_purpose() or self.phase}"
            self.sent[name] = self.sent.get(name, Sent()) + Sent(1, _largest(args[:2]))
        return func(*args, **(kwargs or {}))


def _kind(name: str, args: tuple[Any, ...]) -> str | None:
    kinds = {"reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}
    kinds |= {"all_reduce": "all-reduce", "allgather": "all-gather", "all_gather": "all-gather"}
    kinds |= {"broadcast": "broadcast"}
    if name.startswith("recv_"):  # a message, which ranks send each other in place of a collective
        return "all-gather" if args[-1] == GATHERING else "all-reduce"
    return next((kind for part, kind in kinds.items() if part in name), None)


def _purpose() -> str | None:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        frame = frame.f_back
        module = frame.f_globals.get("__name__", "")
        for prefix, purpose in ASKED_BY.items():
            if module.startswith(prefix):
                return purpose
    return None


def _largest(arguments: Iterable[Any]) -> int:
    """Bytes of the larger side: what is reduced, or assembled from all ranks."""
    return max(num_bytes(pytree.tree_leaves(argument)) for argument in arguments)


class Kept:
    """Within: what autograd saves for backward is noted, each storage once."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        # a detached tensor: an output that is saved and returned as it is would keep itself alive
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda x: x)

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        self._storages[storage._cdata] = storage
        return tensor.detach()

    def num_bytes(self, apart_from: Iterable[Tensor]) -> int:
        """Of all storages as large as they are now, those of some tensors left out.

        FSDP frees a block's gathered parameters by making their storage empty.
        """
        known = {_storage(tensor)._cdata for tensor in apart_from}
        return sum(x.nbytes() for key, x in self._storages.items() if key not in known)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, as operations make them and as they are dropped.

    What a kernel allocates and frees within one operation is not seen.

    Args:
        held: tensors that exist already.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}
        self._note(held)

    def __enter__(self) -> LiveBytes:
        self._resizing = _watched_resizing(self._resized)
        self._resizing.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._resizing.__exit__(*exc)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self._note(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _note(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = _storage(tensor)
            if storage._cdata not in self._alive:
                key = storage._cdata
                end = weakref.ref(storage, lambda _, key=key: self._dropped(key))  # type: ignore[misc]
                self._alive[key] = end, 0
                self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if (entry := self._alive.get(storage._cdata)) is not None:
            size = storage.nbytes()
            self._alive[storage._cdata] = entry[0], size
            self.now += size - entry[1]
            self.peak = max(self.peak, self.now)

    def _dropped(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]


@contextmanager
def _watched_resizing(tell: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Within: `tell` hears of storages made larger or smaller, which is no operation of torch's."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        tell(storage)
        return result

    torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return local(tensor).untyped_storage()


def num_bytes(values: Iterable[Any]) -> int:
    """Of this rank's parts of those that are tensors."""
    return sum(local(value).nbytes for value in values if isinstance(value, Tensor))
