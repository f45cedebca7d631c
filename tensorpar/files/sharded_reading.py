"""Parts of tensors out of sharded files: any box of a global tensor, from whichever files hold it.

Only the bytes of the box are read. Nothing here knows a model, a layout or a process group.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from tensorpar.files.positioned import bytes_of, read_into
from tensorpar.files.sharded_format import RankHeader, Slice, file_name, read_checkpoint

#: half-open ranges of indices, one per dim.
Box = tuple[tuple[int, int], ...]
_CHUNK = 1 << 22


@dataclass
class ShardedFiles:
    """The open files of a checkpoint.

    Attributes:
        headers: of all ranks, in order.
        handles: the files' descriptors, in order.
        num_bytes_read: of tensors, so far.
    """

    headers: list[RankHeader]
    handles: list[int]
    num_bytes_read: int = 0

    def read(self, name: str, box: Box, preferred: int = 0) -> torch.Tensor:
        """The part of a tensor that lies in `box`, on the CPU.

        Args:
            name: the tensor's; not a tie's.
            box: ranges within its global shape.
            preferred: the file to take replicated tensors from, so that ranks spread their reads.
        """
        first = self.headers[0]
        part = torch.empty([stop - start for start, stop in box], dtype=first.dtypes[name])
        ranks = range(len(self.headers))
        if first.slices[name].dim is None:
            ranks = range(preferred % len(self.headers), preferred % len(self.headers) + 1)
        for rank in ranks:
            held = box_of(self.headers[rank].slices[name])
            common = tuple(
                (max(one[0], other[0]), min(one[1], other[1]))
                for one, other in zip(held, box, strict=True)
            )
            if all(start < stop for start, stop in common):
                here = tuple(
                    slice(start - origin[0], stop - origin[0])
                    for (start, stop), origin in zip(common, box, strict=True)
                )
                part[here] = self._read_within(rank, name, held, common)
        return part

    def _read_within(self, rank: int, name: str, held: Box, box: Box) -> torch.Tensor:
        """`box`, which lies within what one file holds."""
        header = self.headers[rank]
        assert header.offsets is not None
        part = torch.empty([stop - start for start, stop in box], dtype=header.dtypes[name])
        memory, done = bytes_of(part), 0
        for start, length in runs(held, box):
            begin, num_bytes = start * part.itemsize, length * part.itemsize
            target = memory[done : done + num_bytes]
            read_into(self.handles[rank], target, header.offsets[name] + begin)
            done += num_bytes
        self.num_bytes_read += done
        return part


@contextmanager
def opened_sharded(folder: Path) -> Iterator[ShardedFiles]:
    """Within: the files of a checkpoint, open; raises ValueError as `read_checkpoint` does."""
    headers = read_checkpoint(folder)
    with ExitStack() as stack:
        names = [file_name(rank, len(headers)) for rank in range(len(headers))]
        files = [stack.enter_context((folder / name).open("rb")) for name in names]
        yield ShardedFiles(headers, [file.fileno() for file in files])


def box_of(part: Slice) -> Box:
    """Where a rank's part lies in the whole tensor."""
    return tuple(
        (part.start, part.stop) if dim == part.dim else (0, size)
        for dim, size in enumerate(part.shape)
    )


def runs(held: Box, box: Box) -> Iterator[tuple[int, int]]:
    """Start and length, in elements, of the contiguous runs that `box` is in a stored `held`."""
    sizes = [stop - start for start, stop in held]
    # dims that are taken whole join the run of the dim before them
    inner = len(box)
    while inner and box[inner - 1] == held[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)
    length = prod(stop - start for start, stop in box[inner:])
    strides = [prod(sizes[dim + 1 :]) for dim in range(len(box))]
    first = sum((b[0] - h[0]) * s for b, h, s in zip(box, held, strides, strict=True))
    yield from _outer_runs([stop - start for start, stop in box[:inner]], strides, first, length)


def _outer_runs(
    counts: Sequence[int], strides: Sequence[int], first: int, length: int
) -> Iterator[tuple[int, int]]:
    if not counts:
        yield first, length
        return
    for i in range(counts[0]):
        yield from _outer_runs(counts[1:], strides[1:], first + i * strides[0], length)


def damaged(files: ShardedFiles, rank: int) -> list[str]:
    """The names of tensors whose bytes in a rank's file are not those that were saved."""
    header, handle = files.headers[rank], files.handles[rank]
    assert header.offsets is not None
    buffer = memoryview(bytearray(_CHUNK))
    wrong = []
    for name, spec in header.specs().items():
        crc = 0
        for done in range(0, spec.num_bytes, _CHUNK):
            chunk = buffer[: min(_CHUNK, spec.num_bytes - done)]
            read_into(handle, chunk, header.offsets[name] + done)
            crc = zlib.crc32(chunk, crc)
        if crc != int(header.slices[name].crc32, 16):
            wrong.append(name)
    return wrong
