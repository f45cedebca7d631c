"""Where a rank's part of a tensor lies in a file that holds the whole one: pure arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.tensor import DTensor

from tensorpar.parameters import local, shard_dim
from tensorpar.partition import chunk_bounds
from tensorpar.styles import Layout

#: from how many bytes on a stretch of a file is worth a write of its own.
LONG = 1 << 18


@dataclass(frozen=True, eq=False)
class Part:
    """What a rank holds of a tensor, its dims in the order in which the file has them.

    Attributes:
        values: the part; not contiguous where our layout permutes.
        shape: of the whole tensor, likewise with every axis a dim of its own.
        dim: along which ranks hold chunks; None where every rank holds all.
        num_ranks: that hold chunks.
        start: the part's first index along `dim`.
    """

    values: torch.Tensor
    shape: tuple[int, ...]
    dim: int | None
    num_ranks: int = 1
    start: int = 0

    @classmethod
    def of(cls, tensor: torch.Tensor, layout: Layout | None) -> Part:
        """The part of a parameter or buffer that this rank holds.

        Args:
            tensor: plain and the same on all ranks, or a DTensor on a mesh of one dim.
            layout: of a parameter that a plan has laid out.
        """
        values, shape = local(tensor).detach(), tensor.shape
        dim = shard_dim(tensor)
        num_ranks, start = 1, 0
        if isinstance(tensor, DTensor) and dim is not None:
            mesh = tensor.device_mesh
            num_ranks = mesh.size()
            start, _ = chunk_bounds(shape[dim], num_ranks, mesh.get_local_rank())
        if layout is not None:
            to_file = layout.pattern.unjoined.inverse
            values = to_file.apply(values)
            shape = to_file.apply(torch.empty(shape, device="meta")).shape
            if dim is not None:
                dim = layout.pattern.left_axes.index(layout.pattern.right_axes[dim])
        return cls(values, tuple(shape), dim if num_ranks > 1 else None, num_ranks, start)

    @property
    def is_long(self) -> bool:
        """Whether each of the part's stretches is worth a write of its own; on all ranks alike."""
        if self.dim is None or prod(self.shape[: self.dim]) == 1:
            return True
        chunk = -(-self.shape[self.dim] // self.num_ranks)
        return chunk * self._row_bytes >= LONG

    @property
    def _row_bytes(self) -> int:
        """How far apart neighbours along `dim` are."""
        assert self.dim is not None
        return prod(self.shape[self.dim + 1 :]) * self.values.itemsize

    def stretches(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The stretches of the file that the part is made of, each with its place in the tensor.

        Each has the dims from `dim` on; places are in bytes. There is none without elements.
        """
        if not self.values.numel():
            return
        if self.dim is None:
            yield self.values, 0
            return
        outer = itertools.product(*map(range, self.shape[: self.dim]))
        for number, index in enumerate(outer):
            place = number * self.shape[self.dim] + self.start
            yield self.values[index], place * self._row_bytes

    def put_into(self, room: torch.Tensor, piece: tuple[slice, ...]) -> None:
        """Copy what lies within a piece of the whole tensor.

        Args:
            room: of the piece's shape.
            piece: slices of the leading dims; the part is sharded.
        """
        assert self.dim is not None
        rest = (slice(0, size) for size in self.shape[len(piece) :])
        wanted = [*piece, *rest]
        begin, end = wanted[self.dim].start, wanted[self.dim].stop
        first = max(begin, self.start)
        last = min(end, self.start + self.values.shape[self.dim])
        if first < last:
            wanted[self.dim] = slice(first - self.start, last - self.start)
            own = self.values[tuple(wanted)]
            room.narrow(self.dim, first - begin, last - first).copy_(own)
