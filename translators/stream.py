"""The executor: one Hugging Face tensor at a time, from its parts in one layout to another's.

A tensor goes through in slabs of rows where both layouts keep rows together, else as a whole; so
each of two workers has a buffer of a few megabytes, or of a tensor. Nothing is mapped.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from tensorpar.files.disk import reserve, start_writing
from tensorpar.files.positioned import bytes_of, write_from
from tensorpar.files.safetensors_header import TensorSpec

from .assembly import Place, Tensor
from .destination import Destination, Write
from .out_files import OutFile
from .stored import Stored, blocks, carried, carrier, scratch_for

#: while one waits for the disk, the other computes.
NUM_WORKERS = 2
#: what is read, and what is converted, summed and written, at once: it should stay in the cache.
SLAB_BYTES, BLOCK_BYTES = 1 << 22, 1 << 20


@contextmanager
def one_thread() -> Iterator[None]:
    """Within: torch uses one thread; blocks are too small to gain from more, which would spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def slabs(
    spec: TensorSpec, stored: Sequence[tuple[Stored, Place]], places: Iterable[Place] = ()
) -> list[range]:
    """The rows of a tensor in groups of which each can be read and written on its own.

    Args:
        spec: the tensor's.
        stored: what is read.
        places: the parts of it that are written.
    """
    num_rows = spec.shape[0] if spec.shape else 1
    wanted = [*(place for _, place in stored), *places]
    together = any(place.within(spec.shape, range(1)) is None for place in wanted)
    if together or not spec.num_bytes or not all(one.sliceable for one, _ in stored):
        return [range(num_rows)]
    step = max(SLAB_BYTES * num_rows // spec.num_bytes, 1)
    return [range(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


class Buffer:
    """Memory for a slab at a time; it grows to the largest that was asked for."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.scratch = torch.empty(BLOCK_BYTES, dtype=torch.uint8)

    def filled(self, tensor: Tensor, rows: range) -> torch.Tensor:
        """Rows of a tensor in this memory, carried as integers; what was there before is gone.

        Raises:
            ValueError: its replicas differ, or a file cannot be read.
        """
        spec = tensor.spec
        shape = (len(rows), *spec.shape[1:]) if spec.shape else ()
        num_bytes = TensorSpec(spec.dtype, shape).num_bytes
        if num_bytes > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        slab = self._memory[:num_bytes].view(carrier(spec.dtype)).view(shape)
        for stored, place in tensor.parts:
            part, first = _within(place, spec, rows)
            stored.read(part.view(slab), first, self.scratch)
        for stored, place in tensor.copies:
            part, first = _within(place, spec, rows)
            if not stored.equals(part.view(slab), first, self.scratch):
                raise ValueError(
                    f"{tensor.key} differs between ranks, required: the same bits in all files "
                    "that hold a copy of it; pass the files of one step of one run"
                )
        return slab


def _within(place: Place, spec: TensorSpec, rows: range) -> tuple[Place, int]:
    found = place.within(spec.shape, rows)
    assert found is not None, "slabs tells only rows that can be told apart"
    return found


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
        progress: is told how many bytes of tensors have been written, slab by slab.

    Raises:
        ValueError: replicas that differ, a file that cannot be read.
        OSError: the disk is full.
    """
    for name, content in destination.small.items():
        (folder / name).write_bytes(content)
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        outs = []
        for file in destination.files:
            offsets = file.begin(folder / file.name)
            handle = stack.enter_context((folder / file.name).open("r+b")).fileno()
            reserve(handle, _end(file, offsets))
            outs.append(_Out(file, handle, offsets, dict.fromkeys(file.tensors, 0)))
        disk = ThreadPoolExecutor(1)  # it waits while the disk has enough to do
        stack.callback(disk.shutdown, cancel_futures=True)
        workers: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(NUM_WORKERS):
            workers.put(_Worker(outs, destination.writes, disk, progress))

        def pass_on(tensor: Tensor) -> None:
            worker = workers.get()
            try:
                worker.write(tensor)
            finally:
                workers.put(worker)

        pool = ThreadPoolExecutor(NUM_WORKERS)
        try:
            for _ in pool.map(pass_on, tensors):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        for out in outs:
            out.file.finish(out.handle, out.checksums, [other.checksums for other in outs])


def _end(file: OutFile, offsets: Mapping[str, int]) -> int:
    """Where the last tensor ends."""
    return max((offsets[key] + spec.num_bytes for key, spec in file.tensors.items()), default=0)


class _Out(NamedTuple):
    """An open file, where its tensors begin in it, and what has been summed of them."""

    file: OutFile
    handle: int
    offsets: Mapping[str, int]
    checksums: dict[str, int]


class _Worker:
    """Memory through which one tensor at a time passes.

    Args:
        outs: the open files.
        writes: by Hugging Face's key, where parts go.
        disk: a thread that sends on to the disk what has been written.
        progress: is told how many bytes were written.
    """

    def __init__(
        self,
        outs: Sequence[_Out],
        writes: Mapping[str, Sequence[Write]],
        disk: ThreadPoolExecutor,
        progress: Callable[[int], object],
    ) -> None:
        self._outs, self._writes, self._disk, self._progress = outs, writes, disk, progress
        self._buffer = Buffer()
        self._block = torch.empty(BLOCK_BYTES, dtype=torch.uint8)

    def write(self, tensor: Tensor) -> None:
        """Read a tensor and write all its parts."""
        writes = self._writes[tensor.key]
        for rows in slabs(tensor.spec, tensor.stored, [one.place for one in writes]):
            slab = self._buffer.filled(tensor, rows)
            for one in writes:
                part, first = _within(one.place, tensor.spec, rows)
                values = part.view(slab).view(tensor.spec.dtype)
                self._write_part(self._outs[one.file], one, values, first)
                self._progress(values.numel() * one.dtype.itemsize)

    def _write_part(self, out: _Out, one: Write, values: torch.Tensor, first: int) -> None:
        """Write elements of a part from index `first` on."""
        size = one.dtype.itemsize
        offset = out.offsets[one.key] + first * size
        for start, block in blocks(values, BLOCK_BYTES // max(size, values.itemsize)):
            memory = bytes_of(self._as_written(block, one.dtype))
            if out.file.checksummed:
                out.checksums[one.key] = zlib.crc32(memory, out.checksums[one.key])
            write_from(out.handle, memory, offset + start * size)
        self._disk.submit(start_writing, out.handle, offset, values.numel() * size)

    def _as_written(self, block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous block in the wanted dtype: itself, or in memory of our own."""
        if block.dtype != dtype:
            own = self._block[: block.numel() * dtype.itemsize].view(dtype).view(block.shape)
            return own.copy_(block)
        if block.is_contiguous():
            return block
        return scratch_for(self._block, carried(block)).copy_(carried(block))
