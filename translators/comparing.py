"""Two checkpoints of any two layouts, tensor by tensor; and one against its own checksums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from tensorpar.files.sharded_format import file_name
from tensorpar.files.sharded_reading import damaged, opened_sharded

from .assembly import Tensor
from .stored import blocks, carried
from .stream import BLOCK_BYTES, Buffer, one_thread, slabs
from .table import Table

#: values that are compared at once.
_NUM = BLOCK_BYTES // 8


@dataclass(frozen=True)
class Measure:
    """What counts as the same.

    Attributes:
        tolerance: the largest absolute difference that is none; None compares bits and dtypes.
        cast: what floating-point tensors of the first checkpoint are converted to before that.
    """

    tolerance: float | None = None
    cast: torch.dtype | None = None


BITWISE = Measure()


def differences(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    table: Table | None,
    measure: Measure = BITWISE,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[str]:
    """A line for each tensor that is not the same in both; all are read once.

    Args:
        left: one checkpoint's tensors.
        right: the other's.
        table: the family's, which knows the tied head that only one of the two may hold.
        measure: what counts as the same.
        progress: is told how many bytes of `left` have been compared.
    """
    mine, theirs = _by_name(left, table), _by_name(right, table)
    yield from (f"{key} is only in the first" for key in _absent(left, theirs))
    yield from (f"{key} is only in the second" for key in _absent(right, mine))
    buffers = [Buffer(), Buffer()]
    done = set()
    for key, one in mine.items():
        other = theirs.get(key)
        if other is None or (one.key, other.key) in done:
            continue
        done.add((one.key, other.key))
        told = _facts(one, other, measure) or _values(one, other, buffers, measure)
        if told:
            yield f"{key} {told}"
        progress(one.spec.num_bytes)


def damage(folder: Path) -> Iterator[str]:
    """A line for each tensor of sharded files that is not what was saved, by its checksum.

    Raises:
        ValueError: headers that were altered, files that are missing.
    """
    with opened_sharded(folder) as files:
        for rank in range(len(files.headers)):
            name = file_name(rank, len(files.headers))
            yield from (f"{key} in {name} is damaged" for key in damaged(files, rank))


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    buffers = [Buffer(), Buffer()]
    return not (_facts(one, other, BITWISE) or _values(one, other, buffers, BITWISE))


def _absent(tensors: Sequence[Tensor], others: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors that others have under none of their names: ties need not be told by both."""
    for one in tensors:
        if not any(name in others for name in (one.key, *one.aliases)):
            yield one.key


def _by_name(tensors: Sequence[Tensor], table: Table | None) -> Mapping[str, Tensor]:
    names = {name: one for one in tensors for name in (one.key, *one.aliases)}
    source, copy = (table.tied.get("hf") if table is not None else None) or ("", "")
    if source in names:
        names.setdefault(copy, names[source])
    return names


def _facts(one: Tensor, other: Tensor, measure: Measure) -> str | None:
    if one.spec.shape != other.spec.shape:
        return f"has shapes {one.spec.shape} and {other.spec.shape}"
    dtype = one.spec.dtype
    if measure.cast is not None and dtype.is_floating_point:
        dtype = measure.cast
    if measure.tolerance is None and dtype != other.spec.dtype:
        return f"has dtypes {dtype} and {other.spec.dtype}"
    return None


def _values(
    one: Tensor,
    other: Tensor,
    buffers: Sequence[Buffer],
    measure: Measure,
) -> str | None:
    num_wrong, largest = 0, 0.0
    with one_thread():
        for rows in slabs(one.spec, (*one.stored, *other.stored)):
            sides = buffers[0].filled(one, rows), buffers[1].filled(other, rows)
            for (_, x), (_, y) in zip(*(blocks(side, _NUM) for side in sides), strict=True):
                if one.spec.dtype == other.spec.dtype and torch.equal(x, y):
                    continue
                wrong, far = _far(x.view(one.spec.dtype), y.view(other.spec.dtype), measure)
                num_wrong, largest = num_wrong + wrong, max(largest, far)
    if not num_wrong:
        return None
    num_values = prod(one.spec.shape)
    return f"differs in {num_wrong} of {num_values} values, by at most {largest:.3g}"


def _far(mine: torch.Tensor, theirs: torch.Tensor, measure: Measure) -> tuple[int, float]:
    """How many values differ, and by how much at most; a NaN is equal to a NaN within tolerance."""
    if measure.cast is not None and mine.is_floating_point():
        mine = mine.to(measure.cast)
    x, y = mine.double(), theirs.double()
    distance = (x - y).abs()
    if measure.tolerance is None:
        wrong = carried(mine) != carried(theirs)
    else:
        # infinities too are equal, whose distance is no number
        wrong = ~((x.isnan() & y.isnan()) | (x == y) | (distance <= measure.tolerance))
    return int(wrong.sum()), float(distance[wrong].max()) if wrong.any() else 0.0
