"""Bytes of tensors to and from a place in a file, without an intermediate copy."""

from __future__ import annotations

import os

import torch

#: what one system call moves at most. Linux refuses more than about 2 GB, and gives a large write
#: large pages, which a virtual machine may have to ask of its host first: several times slower.
_LARGEST = 1 << 18


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    # one element counts as contiguous whatever its stride, which a view of bytes refuses
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    memory: memoryview = flat.view(torch.uint8).numpy().data
    return memory


def read_into(file: int, memory: memoryview, offset: int) -> None:
    """Fill `memory` from an open file.

    Raises:
        ValueError: the file ends before.
    """
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done : done + _LARGEST]], offset + done)
        if count == 0:
            raise ValueError(f"the file ends at byte {offset + done}, within a tensor")
        done += count


def write_from(file: int, memory: memoryview, offset: int) -> None:
    """Write all of `memory` to an open file; raises OSError where the disk is full."""
    done = 0
    while done < len(memory):
        done += os.pwrite(file, memory[done : done + _LARGEST], offset + done)
