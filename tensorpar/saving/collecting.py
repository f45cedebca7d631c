"""The tensors of a model for a file that the first rank saves.

The first rank leads: it tells the others which file all are to write parts of, or which tensor it
needs whole, or that it is done, or that it failed. So they need not know in which order it saves,
and do not wait for one that has gone. A tensor that is needed whole is so on the first rank only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tensorpar.parameters import shard_dim
from tensorpar.partition import chunk_bounds
from tensorpar.promise import Promise
from tensorpar.saving.own_parts import OwnParts
from tensorpar.saving.pieces import pieces
from tensorpar.styles import Layout

_DONE, _FAILED, _WRITE = -1, -2, -3
_BYTE = torch.uint8


@dataclass(frozen=True)
class Wanted:
    """The origin of a promise: calling it asks for the tensor."""

    collector: Collector
    name: str

    def __call__(self) -> torch.Tensor:
        """The values, whole, on the first rank."""
        return self.collector.ask(self.name)


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
        known = {name: layout for name, (layout, _) in layouts.items()}
        self._own = OwnParts(self.tensors, known, self._device)

    def promises(self) -> dict[str, Promise]:
        """On the first rank: a promise of every tensor, in Hugging Face's layout.

        The origin is called for the values; they are valid until the call after the next.
        """
        return {name: self._promise(name) for name in self._names}

    def _promise(self, name: str) -> Promise:
        tensor = self.tensors[name]
        return Promise.of(Wanted(self, name), self._hf_shape(name), tensor.dtype)

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
                self._share([f"{type(error).__name__}: {error}"])
            raise
        self._tell(_DONE)

    def write_ahead(
        self, handle: int, path: str, places: Mapping[str, tuple[Wanted, int]]
    ) -> list[str]:
        """On the first rank, which leads: let every rank write what it has of a file.

        Args:
            handle: the open file.
            path: its path.
            places: origin and place of the file's tensors.

        Returns:
            The names that are written; none if not all ranks see the file.
        """
        known = self._own.parts
        own = {name: (of.name, at) for name, (of, at) in places.items() if of.name in known}
        plan = self._own.plan(handle, path, dict(own.values()))
        if plan is None:
            return []
        self._tell(_WRITE)
        self._share([plan])
        return list(own) if self._own.write(plan) else []

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
        while (command := self._tell(0)) not in (_DONE, _FAILED):
            if command == _WRITE:
                with suppress(Exception):  # the first rank has heard of it, and will say so
                    self._own.write(self._share([None]))
            else:
                collect(self.tensors[self._names[command]], None)
        if command == _FAILED:
            raise RuntimeError(f"rank 0, which writes, failed: {self._share([None])}")

    def _share(self, message: list[Any]) -> Any:
        """What the first rank has, on all ranks."""
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(message, src=0, device=self._device)
        return message[0]

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
