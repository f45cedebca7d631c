"""Whole tensors on the first rank, one at a time and when it wants them; no other holds any.

The first rank leads: it tells the others which tensor it needs next, or that it is done, or that it
failed. So they need not know in which order it saves, and do not wait for one that has gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tensorpar.parameters import shard_dim
from tensorpar.partition import chunk_bounds
from tensorpar.promise import Promise
from tensorpar.styles import Layout

#: what travels at once, and what a rank that is not the first needs beside its model.
PIECE_BYTES = 16 << 20
_DONE, _FAILED = -1, -2
_BYTE = torch.uint8


class Collector:
    """The tensors of a model, whole and in Hugging Face's layout.

    Args:
        tensors: name to parameter or buffer; the same names in the same order on all ranks.
        layouts: name to layout and sizes of its axes, for those that a plan has laid out.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        layouts: Mapping[str, tuple[Layout, Mapping[str, int]]],
    ) -> None:
        self.tensors, self.layouts = dict(tensors), layouts
        self._names = list(self.tensors)
        self._rooms: list[torch.Tensor] = []
        meshes = [x.device_mesh for x in self.tensors.values() if isinstance(x, DTensor)]
        self._device = torch.device(meshes[0].device_type if meshes else "cpu")

    def promises(self) -> dict[str, Promise]:
        """On the first rank: a promise of every tensor, in Hugging Face's layout.

        The origin is called for the values; they are valid until the call after the next.
        """
        return {name: self._promise(name) for name in self._names}

    def _promise(self, name: str) -> Promise:
        tensor = self.tensors[name]
        return Promise.of(partial(self.ask, name), self._hf_shape(name), tensor.dtype)

    def _hf_shape(self, name: str) -> torch.Size:
        shape = self.tensors[name].shape
        if name not in self.layouts:
            return shape
        return self.layouts[name][0].pattern.inverse.apply(torch.empty(shape, device="meta")).shape

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On the first rank, within: it may ask; the others are told how it ended."""
        try:
            yield
        except BaseException as error:
            with suppress(RuntimeError):  # a rank that is gone is not what went wrong first
                self._tell(_FAILED)
                dist.broadcast_object_list([f"{type(error).__name__}: {error}"], src=0)
            raise
        self._tell(_DONE)

    def ask(self, name: str) -> torch.Tensor:
        """On the first rank, which leads: a contiguous CPU tensor in Hugging Face's layout.

        Its memory is that of the tensor before the last: pages are not asked of the system again.
        """
        self._tell(self._names.index(name))
        out = self._room(self._hf_shape(name), self.tensors[name].dtype)
        if name not in self.layouts:
            collect(self.tensors[name], out)
            return out
        layout, sizes = self.layouts[name]
        ours = layout.pattern.apply(out, **sizes)
        collect(self.tensors[name], ours)
        if ours.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
            return layout.pattern.inverse.apply(ours).contiguous()
        return out

    def _room(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if not self._rooms:
            largest = max(x.nbytes for x in self.tensors.values())
            self._rooms = [torch.empty(largest, dtype=_BYTE) for _ in range(2)]
        self._rooms.reverse()
        return self._rooms[0][: shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def serve(self) -> None:
        """On every other rank: give what the first asks for, until it is done.

        Raises:
            RuntimeError: the first rank failed; with what.
        """
        while (command := self._tell(0)) >= 0:
            collect(self.tensors[self._names[command]], None)
        if command == _FAILED:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0)
            raise RuntimeError(f"rank 0, which writes, failed: {message[0]}")

    def _tell(self, command: int) -> int:
        """What the first rank says, on all ranks."""
        said = torch.tensor([command], dtype=torch.int64, device=self._device)
        if dist.get_world_size() > 1:
            dist.broadcast(said, src=0)
        return int(said)


@torch.no_grad()
def collect(tensor: torch.Tensor, out: torch.Tensor | None) -> None:
    """Copy a parameter, whole, into a tensor of the first rank. Collective.

    Args:
        tensor: a DTensor, or the same plain tensor on all ranks.
        out: of its global shape, on the first rank; None elsewhere.
    """
    if not isinstance(tensor, DTensor):
        if out is not None:
            out.copy_(tensor)
    elif tensor.device_mesh.ndim > 1:  # sharded over data-parallel ranks as well
        whole = tensor.full_tensor()
        if out is not None:
            out.copy_(whole)
    elif (dim := shard_dim(tensor)) is None:
        if out is not None:
            out.copy_(tensor.to_local())
    else:
        ranks = dist.get_process_group_ranks(tensor.device_mesh.get_group())
        if 0 in ranks:
            _collect_shards(tensor, dim, ranks, out)


def _collect_shards(tensor: DTensor, dim: int, ranks: list[int], out: torch.Tensor | None) -> None:
    shape, local = tensor.shape, tensor.to_local()
    for place, rank in enumerate(ranks):
        start, stop = chunk_bounds(shape[dim], len(ranks), place)
        part = None if out is None else out.narrow(dim, start, stop - start)
        if rank == 0 and part is not None:
            part.copy_(local)
        elif part is not None:
            for piece in pieces(part.shape, part.element_size()):
                _receive(part[piece], rank, local.device)
        elif rank == dist.get_rank():
            for piece in pieces(local.shape, local.element_size()):
                # as bytes, since not every backend sends every dtype
                dist.send(local[piece].contiguous().view(-1).view(_BYTE), dst=0)


def _receive(into: torch.Tensor, rank: int, device: torch.device) -> None:
    direct = into.is_contiguous() and into.device == device
    buffer = into if direct else torch.empty(into.shape, dtype=into.dtype, device=device)
    dist.recv(buffer.view(-1).view(_BYTE), src=rank)
    if not direct:
        into.copy_(buffer)


def pieces(shape: Sequence[int], element_size: int) -> Iterator[tuple[slice, ...]]:
    """Slices that together cover a tensor once, each of at most `PIECE_BYTES` if it can be.

    Args:
        shape: of the tensor; nothing comes of one without elements.
        element_size: in bytes.
    """
    row_bytes = torch.Size(shape[1:]).numel() * element_size
    if not shape or row_bytes == 0:
        if torch.Size(shape).numel():
            yield ()
        return
    num_rows = PIECE_BYTES // row_bytes
    if num_rows:
        for start in range(0, shape[0], num_rows):
            yield (slice(start, min(start + num_rows, shape[0])),)
    else:
        for row in range(shape[0]):
            for rest in pieces(shape[1:], element_size):
                yield (slice(row, row + 1), *rest)
