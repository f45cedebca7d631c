"""The executor: one Hugging Face tensor at a time, from its parts in one layout to another's.

Memory is one buffer of the largest tensor and a small one; nothing is mapped.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from tensorpar.positioned import bytes_of, write_from
from tensorpar.safetensors_header import TensorSpec

from .assembly import Tensor
from .destination import Destination, Write
from .stored import blocks, carrier, scratch_for

#: what is converted, summed and written at once: it should stay in a core's cache.
BLOCK_BYTES = 1 << 20


class Buffer:
    """Memory for one tensor at a time.

    Args:
        specs: all tensors that it must be able to hold.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        largest = max((spec.num_bytes for spec in specs), default=0)
        self._memory = torch.empty(largest, dtype=torch.uint8)
        self.scratch = torch.empty(BLOCK_BYTES, dtype=torch.uint8)

    def filled(self, tensor: Tensor) -> torch.Tensor:
        """A tensor in this memory, carried as integers; the one before is gone.

        Raises:
            ValueError: its replicas differ, or a file cannot be read.
        """
        spec = tensor.spec
        whole = self._memory[: spec.num_bytes].view(carrier(spec.dtype)).view(spec.shape)
        for stored, place in tensor.parts:
            stored.read(place.view(whole), self.scratch)
        for stored, place in tensor.copies:
            if not stored.equals(place.view(whole), self.scratch):
                raise ValueError(
                    f"{tensor.key} differs between ranks, required: the same bits in all files "
                    "that hold a copy of it; pass the files of one step of one run"
                )
        return whole


def write(
    tensors: Sequence[Tensor],
    destination: Destination,
    folder: Path,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write all files of a destination into a folder; syncing them is left to the caller.

    Args:
        tensors: what to write.
        destination: the plan.
        folder: exists.
        progress: is told how many bytes of tensors have been written, block by block.

    Raises:
        ValueError: replicas that differ, a file that cannot be read.
        OSError: the disk is full.
    """
    for name, content in destination.small.items():
        (folder / name).write_bytes(content)
    with ExitStack() as stack:
        offsets, handles = [], []
        for file in destination.files:
            offsets.append(file.begin(folder / file.name))
            handles.append(stack.enter_context((folder / file.name).open("r+b")).fileno())
        checksums: list[dict[str, int]] = [{} for _ in handles]
        buffer = Buffer(tensor.spec for tensor in tensors)
        out = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        for tensor in tensors:
            whole = buffer.filled(tensor)
            for one in destination.writes[tensor.key]:
                place = handles[one.file], offsets[one.file][one.key]
                summed = destination.files[one.file].checksummed
                crc = _write_part(whole, tensor.spec.dtype, one, place, out, summed, progress)
                checksums[one.file][one.key] = crc
        for number, file in enumerate(destination.files):
            file.finish(handles[number], checksums[number], checksums)


def _write_part(  # noqa: PLR0913  (the inner loop, which builds no objects)
    whole: torch.Tensor,
    dtype: torch.dtype,
    one: Write,
    place: tuple[int, int],
    out: torch.Tensor,
    summed: bool,
    progress: Callable[[int], object],
) -> int:
    """Write a part of `whole`; its CRC-32 if that is asked for."""
    (handle, offset), crc = place, 0
    size = max(dtype.itemsize, one.dtype.itemsize)
    for start, block in blocks(one.place.view(whole), BLOCK_BYTES // size):
        memory = bytes_of(_as_written(block, dtype, one.dtype, out))
        if summed:
            crc = zlib.crc32(memory, crc)
        write_from(handle, memory, offset + start * one.dtype.itemsize)
        progress(len(memory))
    return crc


def _as_written(
    block: torch.Tensor, dtype: torch.dtype, wanted: torch.dtype, out: torch.Tensor
) -> torch.Tensor:
    """A contiguous block in the wanted dtype: itself, or in the memory of `out`."""
    if dtype == wanted:
        if block.is_contiguous():
            return block
        return scratch_for(out, block).copy_(block)
    own = block.view(dtype)
    return out[: own.numel() * wanted.itemsize].view(wanted).view(own.shape).copy_(own)
