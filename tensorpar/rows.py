"""Whether the activations that now pass between regions are whole, or rows of a split sequence.

Inside, each rank has the rows `[batch, its part of the sequence, hidden]` of what one process would
have; regions are then entered by an all-gather and left by a reduce-scatter. Where nothing is
split, they are entered and left as ever: by nothing, and an all-reduce.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import (
    all_gather_region,
    copy_region,
    gather_region,
    reduce_region_,
    reduce_scatter_region,
    scatter_region,
)

#: of every activation that is split: `[batch, sequence, ...]`.
SEQUENCE_DIM = 1


@dataclass(frozen=True)
class Rows:
    """How a sequence is split: in chunks, as `Shard` cuts a dim; the last may be empty.

    Attributes:
        mesh: the tp mesh.
        length: of the whole sequence.
    """

    mesh: DeviceMesh
    length: int

    def split(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of what is the same on all ranks."""
        return scatter_region(whole, SEQUENCE_DIM, self.mesh)

    def join(self, own: torch.Tensor) -> torch.Tensor:
        """All rows, on every rank."""
        return gather_region(own, SEQUENCE_DIM, self.length, self.mesh)

    def mark(self, own: torch.Tensor) -> None:
        """Remember that `own` is rows. Its shape cannot tell: a rank may have all, or none."""
        own._tensorpar_rows = self  # type: ignore[attr-defined]


_rows: ContextVar[Rows | None] = ContextVar("rows_of_a_sequence", default=None)


def current_rows() -> Rows | None:
    """How activations are split where the code now runs; None where they are whole."""
    return _rows.get()


class Splitting:
    """Within: activations between regions are rows; for None, they are whole.

    A class and not a generator, which takes three times as long in every layer.
    """

    __slots__ = ("_rows", "_token")

    def __init__(self, rows: Rows | None) -> None:
        self._rows = rows

    def __enter__(self) -> None:
        self._token = _rows.set(self._rows)

    def __exit__(self, *_: object) -> None:
        _rows.reset(self._token)


def enter_region(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The whole of `x` for a parallel region, whose ranks' gradients are summed on the way back."""
    rows = _rows.get()
    if rows is None:
        return copy_region(x, mesh)
    return all_gather_region(x, SEQUENCE_DIM, rows.length, mesh)


def leave_region(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum over ranks of a region's terms, or this rank's rows of it; `x` is not read again."""
    if _rows.get() is None:
        return reduce_region_(x, mesh)
    return reduce_scatter_region(x, SEQUENCE_DIM, mesh)


def whole_again(x: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor that was marked; another as it is."""
    rows: Rows | None = getattr(x, "_tensorpar_rows", None)
    return x if rows is None else rows.join(x)
