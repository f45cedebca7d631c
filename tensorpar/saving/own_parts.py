"""Ranks that share a machine write their parts of a model into one file, side by side.

Nothing is sent. Where a rank's part is one stretch of the file, or a few long ones, the rank writes
them by itself. Where it is many short ones, as columns of a matrix are, ranks put them together in
memory that they share, some megabytes at a time, of which each then writes a share: a file takes
one write at a time, so short ones of several processes are slower than those of one.

That ranks share a machine and see the same file is found out for each file, not assumed.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tensorpar.files.disk import start_writing
from tensorpar.files.positioned import bytes_of, write_from
from tensorpar.files.shared_memory import attached, make_shared
from tensorpar.partition import chunk_bounds
from tensorpar.saving import pieces
from tensorpar.saving.file_parts import Part
from tensorpar.styles import Layout
from tensorpar.together import on_all_ranks

_NONCE_BYTES = 16
_PAGE = 4096


@dataclass(frozen=True)
class Plan:
    """What the first rank tells the others of a file.

    Attributes:
        path: the file, which is there and begins with the nonce until all have looked.
        nonce: random bytes.
        memory: a file of shared memory that begins with them too; None after the first plan.
        offsets: name of a tensor to the place of its first byte.
    """

    path: str
    nonce: bytes
    memory: Path | None
    offsets: Mapping[str, int]


class OwnParts:
    """The parts of a model that this rank can write.

    Args:
        tensors: name to parameter or buffer; the same names on all ranks.
        layouts: name to layout, for those that a plan has laid out.
        device: of what the process group sends.

    Attributes:
        parts: by name; tensors that data-parallel ranks shard as well are not among them.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        layouts: Mapping[str, Layout],
        device: torch.device,
    ) -> None:
        meshes = [x.device_mesh for x in tensors.values() if isinstance(x, DTensor)]
        flat = next((mesh for mesh in meshes if mesh.ndim == 1), None)
        self._group = None if flat is None else flat.get_group()
        ranks = [0] if self._group is None else dist.get_process_group_ranks(self._group)
        #: the first rank's group holds all there is to write, the others hold copies.
        self._writes = 0 in ranks and dist.get_rank() in ranks
        self._num_ranks, self._device = len(ranks), device
        self._place = ranks.index(dist.get_rank()) if self._writes else 0
        self.parts = {
            name: Part.of(tensor, layouts.get(name))
            for name, tensor in tensors.items()
            if not isinstance(tensor, DTensor) or tensor.device_mesh == flat
        }
        self._apart = False
        self._memory: torch.Tensor | None = None
        self._file: io.FileIO | None = None

    def plan(self, handle: int, path: str, offsets: Mapping[str, int]) -> Plan | None:
        """On the first rank: what to tell the others; None where the ranks are known to be apart.

        Args:
            handle: the open file; what it begins with is written later.
            path: its path.
            offsets: name to place of the first byte, of tensors among `parts`.
        """
        nonce, memory = secrets.token_bytes(_NONCE_BYTES), None
        if not self._apart and self._memory is None and self._num_ranks > 1:
            memory = make_shared(2 * -(-pieces.PIECE_BYTES // _PAGE) * _PAGE, nonce)
            self._apart = memory is None
        if self._apart:
            return None
        write_from(handle, memoryview(nonce), 0)
        return Plan(path, nonce, memory, offsets)

    def write(self, plan: Plan) -> bool:
        """Write this rank's part of every tensor of a plan; collective over the world.

        Returns:
            False, with nothing written, if not all ranks that hold parts share a machine and see
            the file; the same on all ranks.

        Raises:
            OSError: the disk is full, or the file cannot be written, on any rank; on all of them.
        """
        try:
            together = all(on_all_ranks("save_pretrained", partial(self._sees, plan)))
            if plan.memory is not None and dist.get_rank() == 0:
                plan.memory.unlink()
            if together:
                on_all_ranks("save_pretrained", partial(self._write, plan))
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
        if not together:
            self._apart, self._memory = True, None
        return together

    def _sees(self, plan: Plan) -> bool:
        """Whether this rank has the first one's memory and file before it."""
        if not self._writes:
            return True
        try:
            if plan.memory is not None:
                memory = attached(plan.memory)
                if bytes(memory[:_NONCE_BYTES].tolist()) != plan.nonce:
                    return False
                self._memory = memory
            self._file = io.FileIO(plan.path, "r+")
            alone = self._num_ranks == 1
            return (alone or self._memory is not None) and (
                self._file.read(_NONCE_BYTES) == plan.nonce
            )
        except OSError:
            return False

    def _write(self, plan: Plan) -> None:
        if not self._writes:
            return
        parts = [(self.parts[name], offset) for name, offset in plan.offsets.items()]
        long = [(part, offset) for part, offset in parts if part.is_long]
        short = [(part, offset) for part, offset in parts if not part.is_long]
        error = _error_of(partial(self._write_alone, long))
        error = self._write_together(short, error)
        if error is not None:
            raise error

    def _write_alone(self, parts: list[tuple[Part, int]]) -> None:
        """Write the stretches that parts are made of; the first rank also what all hold."""
        for part, offset in parts:
            if part.dim is None and self._place > 0:
                continue
            for values, place in part.stretches():
                at = offset + place
                for piece in pieces.pieces(values.shape, values.itemsize):
                    memory = bytes_of(values[piece].cpu().contiguous())
                    self._put(memory, at)
                    at += len(memory)

    def _write_together(
        self, parts: list[tuple[Part, int]], error: Exception | None
    ) -> Exception | None:
        """Write parts of short stretches; an error of one rank ends it on all."""
        slabs = (slab for part, offset in parts for slab in _slabs(part, offset))
        for number, (part, piece, offset) in enumerate(slabs):
            room = self._room(part, piece, number % 2)
            error = error or _error_of(partial(part.put_into, room, piece))
            # when all are here, all have also written what was in the other half before
            if self._anywhere(error):
                return error
            memory = bytes_of(room)
            first, last = chunk_bounds(len(memory), self._num_ranks, self._place)
            error = _error_of(partial(self._put, memory[first:last], offset + first))
        return error

    def _room(self, part: Part, piece: tuple[slice, ...], half: int) -> torch.Tensor:
        assert self._memory is not None
        shape = [each.stop - each.start for each in piece] + list(part.shape[len(piece) :])
        dtype = part.values.dtype
        memory = self._memory.view(2, -1)[half, : prod(shape) * dtype.itemsize]
        return memory.view(dtype).view(shape)

    def _anywhere(self, error: Exception | None) -> bool:
        """Whether any rank has an error; all wait for each other."""
        told = torch.tensor([error is not None], dtype=torch.int64, device=self._device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        return bool(told)

    def _put(self, memory: memoryview, offset: int) -> None:
        assert self._file is not None
        write_from(self._file.fileno(), memory, offset)
        start_writing(self._file.fileno(), offset, len(memory))


def _slabs(part: Part, offset: int) -> Iterator[tuple[Part, tuple[slice, ...], int]]:
    """The pieces of a whole tensor, each with its place in the file."""
    size = part.values.itemsize
    for piece in pieces.pieces(part.shape, size):
        yield part, piece, offset
        sizes = [each.stop - each.start for each in piece]
        offset += prod([*sizes, *part.shape[len(piece) :]]) * size


def _error_of(step: Callable[[], object]) -> Exception | None:
    try:
        step()
    except Exception as error:
        return error
    return None
