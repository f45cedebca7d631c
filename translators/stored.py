"""Tensors on disk that are read block by block into memory that somebody else owns.

Values are carried as integers of their size, so that no bit of any dtype can change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tensorpar.positioned import bytes_of, read_into
from tensorpar.safetensors_header import TensorSpec

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Stored(Protocol):
    """A tensor that can be read."""

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""

    def read(self, target: torch.Tensor, scratch: torch.Tensor) -> None:
        """Fill `target`, of its shape and any strides, carried as integers.

        Args:
            target: memory of the caller.
            scratch: bytes to read through where `target` has gaps.
        """

    def equals(self, target: torch.Tensor, scratch: torch.Tensor) -> bool:
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

    def read(self, target: torch.Tensor, scratch: torch.Tensor) -> None:
        """As for `Stored`; what `target` has together is read in place."""
        size = self.spec.dtype.itemsize
        if target.is_contiguous():
            self._read_bytes(bytes_of(target), 0)
            return
        for start, block in blocks(target, scratch.numel() // size):
            part = scratch_for(scratch, block)
            self._read_bytes(bytes_of(part), start * size)
            block.copy_(part)

    def equals(self, target: torch.Tensor, scratch: torch.Tensor) -> bool:
        """As for `Stored`."""
        size = self.spec.dtype.itemsize
        for start, block in blocks(target, scratch.numel() // size):
            part = scratch_for(scratch, block)
            self._read_bytes(bytes_of(part), start * size)
            if not torch.equal(part, block):
                return False
        return True

    def _read_bytes(self, memory: memoryview, start: int) -> None:
        try:
            read_into(self.handle, memory, self.offset + start)
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

    def read(self, target: torch.Tensor, scratch: torch.Tensor) -> None:  # noqa: ARG002
        """As for `Stored`."""
        target.copy_(carried(self.tensor))

    def equals(self, target: torch.Tensor, scratch: torch.Tensor) -> bool:  # noqa: ARG002
        """As for `Stored`."""
        return torch.equal(target, carried(self.tensor))


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
