"""Tensors on disk that are read block by block into memory that somebody else owns.

Values are carried as integers of their size, so that no bit of any dtype can change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tensorpar.files.positioned import bytes_of, read_into
from tensorpar.files.safetensors_header import TensorSpec

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stored(Protocol):
    """A tensor that can be read."""

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""

    @property
    def sliceable(self) -> bool:
        """Whether a range of its elements can be read on its own."""

    def read(self, target: torch.Tensor, first: int, scratch: torch.Tensor) -> None:
        """Fill `target` with elements that follow each other.

        Args:
            target: memory of the caller, of any strides, carried as integers.
            first: the index of the first element; 0 unless this is sliceable.
            scratch: bytes to read through where `target` has gaps.
        """

    def equals(self, target: torch.Tensor, first: int, scratch: torch.Tensor) -> bool:
        """Whether `target` holds the same bits."""


@dataclass(frozen=True)
class InFile:
    """A tensor whose bytes lie together in an open file.

    Attributes:
        spec: its dtype and shape.
        path: the file's, for messages.
        handle: the file's descriptor.
        offset: where it begins.
    """

    spec: TensorSpec
    path: Path
    handle: int
    offset: int
    sliceable = True

    def read(self, target: torch.Tensor, first: int, scratch: torch.Tensor) -> None:
        """As for `Stored`; what `target` has together is read in place."""
        if target.is_contiguous():
            self._read_bytes(bytes_of(target), first)
            return
        for start, block in blocks(target, scratch.numel() // target.itemsize):
            part = scratch_for(scratch, block)
            self._read_bytes(bytes_of(part), first + start)
            block.copy_(part)

    def equals(self, target: torch.Tensor, first: int, scratch: torch.Tensor) -> bool:
        """As for `Stored`."""
        for start, block in blocks(target, scratch.numel() // target.itemsize):
            part = scratch_for(scratch, block)
            self._read_bytes(bytes_of(part), first + start)
            if not torch.equal(part, block):
                return False
        return True

    def _read_bytes(self, memory: memoryview, first: int) -> None:
        try:
            read_into(self.handle, memory, self.offset + first * self.spec.dtype.itemsize)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from None


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor that `torch.load` mapped into memory.

    Attributes:
        tensor: of any strides.
    """

    tensor: torch.Tensor

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""
        return TensorSpec(self.tensor.dtype, tuple(self.tensor.shape))

    @property
    def sliceable(self) -> bool:
        """As for `Stored`."""
        return self.tensor.is_contiguous()

    def read(self, target: torch.Tensor, first: int, scratch: torch.Tensor) -> None:  # noqa: ARG002
        """As for `Stored`."""
        target.copy_(self._part(target, first))

    def equals(self, target: torch.Tensor, first: int, scratch: torch.Tensor) -> bool:  # noqa: ARG002
        """As for `Stored`."""
        return torch.equal(target, self._part(target, first))

    def _part(self, target: torch.Tensor, first: int) -> torch.Tensor:
        own = carried(self.tensor)
        if not self.sliceable:
            return own
        return own.view(-1)[first : first + target.numel()].view(target.shape)


def carrier(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype in which values of `dtype` are carried.

    Raises:
        ValueError: there is none of its size.
    """
    if dtype.itemsize not in _CARRIERS:
        raise ValueError(f"dtype = {dtype}, required: one of at most 8 bytes")
    return _CARRIERS[dtype.itemsize]


def carried(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    return tensor.view(carrier(tensor.dtype))


def scratch_for(scratch: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor like `block` in the beginning of the bytes of `scratch`."""
    return scratch[: block.numel() * block.itemsize].view(block.dtype).view(block.shape)


def blocks(view: torch.Tensor, max_elements: int) -> Iterator[tuple[int, torch.Tensor]]:
    """`view` in pieces that follow each other in row-major order, each with its first index."""
    if view.is_contiguous():
        flat = view.view(-1)
        for start in range(0, flat.numel(), max_elements):
            yield start, flat[start : start + max_elements]
    elif view.numel() <= max_elements:
        yield 0, view
    else:
        row = view[0].numel()
        step = max_elements // row
        for i in range(0, len(view), max(step, 1)):
            for start, block in blocks(view[i : i + step] if step else view[i], max_elements):
                yield i * row + start, block
