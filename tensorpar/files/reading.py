"""Tensors of checkpoint files, read where and when they are asked for, and counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


@dataclass
class Requested:
    """How many bytes of checkpoints this process has asked for.

    Attributes:
        num_bytes: those of the slices that were read, as they are stored.
    """

    num_bytes: int = 0


_counts: list[Requested] = []


@contextmanager
def counting() -> Iterator[Requested]:
    """Within: what this process reads of checkpoints is counted."""
    count = Requested()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


class Source:
    """One tensor of a checkpoint; indexing it reads that slice, and what is not asked for stays.

    Args:
        handle: what can be indexed: safetensors' slice handle, or a tensor that is mapped.
        name: its key and file, for messages.
        lasts: whether a view of the mapped file may be kept for good.
    """

    def __init__(self, handle: Any, name: str = "", *, lasts: bool = False) -> None:
        self._handle = handle
        self.name = name
        self.lasts = lasts
        in_memory = isinstance(handle, torch.Tensor)
        self.shape = tuple(handle.shape if in_memory else handle.get_shape())
        self.dtype = handle.dtype if in_memory else self._slice_without_values().dtype

    def _slice_without_values(self) -> torch.Tensor:
        empty: torch.Tensor = self._handle[0:0] if self.shape else self._handle[...]
        return empty

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The slice; it may be a view of the mapped file, so copy what is to outlive it."""
        values: torch.Tensor = self._handle[index]
        for count in _counts:
            count.num_bytes += values.nbytes
        return values

    def is_same_as(self, other: Source) -> bool:
        """Whether both are one piece of memory, as the tied tensors of a pickle are."""
        own, its = self._handle, other._handle
        both = isinstance(own, torch.Tensor) and isinstance(its, torch.Tensor)
        return both and (own.data_ptr(), own.stride()) == (its.data_ptr(), its.stride())

    def sample(self) -> torch.Tensor:
        """A few values from the middle, by which two checkpoints can be told apart."""
        places = [slice(size // 2, size // 2 + 1) for size in self.shape]
        if places:
            places[-1] = slice(self.shape[-1] // 2, self.shape[-1] // 2 + 8)
        return self[tuple(places) or ...]

    def __repr__(self) -> str:
        """Where it is."""
        return self.name or f"a tensor in memory of shape {self.shape}"


def with_own_storage(view: torch.Tensor) -> torch.Tensor | None:
    """The same memory as a tensor whose storage is its bytes and no others, as a parameter's is.

    None where these bytes are not in one piece, or not where a tensor of their dtype may begin.
    """
    if not view.is_contiguous() or not view.numel() or view.data_ptr() % view.element_size():
        return None
    start = view.storage_offset() * view.element_size()
    storage = view.untyped_storage()[start : start + view.nbytes]
    alone = torch.empty(0, dtype=view.dtype, device=view.device)
    return alone.set_(storage, 0, view.shape)  # type: ignore[call-overload]


def open_sources(
    stack: ExitStack, files: Iterable[str | PathLike[str]], *, last: bool = False
) -> dict[str, Source]:
    """Every tensor of safetensors files by its key; headers are read, values are not.

    Args:
        stack: closes the files.
        files: whose keys are distinct; of equal ones the last counts.
        last: whether views of the mapped files may be kept for good.

    Raises:
        ValueError: a file is missing or truncated.
    """
    sources: dict[str, Source] = {}
    for file in files:
        try:
            reader = stack.enter_context(safe_open(file, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}), required: a whole safetensors file; fetch "
                "it again"
            ) from None
        for key in reader.keys():  # noqa: SIM118
            sources[key] = Source(reader.get_slice(key), f"{key} in {file}", lasts=last)
    return sources
