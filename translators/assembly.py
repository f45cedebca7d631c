"""Where the parts that a layout keeps on disk lie in Hugging Face's tensors: the plan, pure data.

Every change of layout and every cut is a view of Hugging Face's tensors: a part has a first index,
a shape and strides within one of them. So a checkpoint is read by filling these views and written
by emptying them, and one description of a layout serves both directions. The translators
themselves tell the views, run once on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from tensorpar.files.safetensors_header import TensorSpec
from tensorpar.recognition import LayoutName

from .checkpoint import Checkpoint, meta
from .layouts import Layouts, num_heads
from .partial import even_sizes, split_partial
from .problems import refuse
from .shards import split_tensors
from .stored import Stored
from .table import Table
from .tensors import StateDict
from .translate import translate_from_hf, translate_hf_to_smdistributed, translate_to_hf


@dataclass(frozen=True)
class Place:
    """A part of a Hugging Face tensor.

    Attributes:
        key: the tensor's.
        offset: the index of the part's first element.
        shape: the part's.
        strides: in elements of the tensor.
    """

    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a contiguous tensor that begins its memory."""
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)

    def within(self, shape: tuple[int, ...], rows: range) -> tuple[Place, int] | None:
        """What of this part lies in some rows of a tensor of `shape`, where that can be told.

        Returns:
            Its place from the first of these rows on, and the index in the part of its first
            element; the elements follow each other in the part. None where they do not.
        """
        if not shape or len(rows) == shape[0]:
            return self, 0
        row = prod(shape[1:])
        if _is_contiguous(self):
            first = max(self.offset, rows.start * row)
            last = max(min(self.offset + prod(self.shape), rows.stop * row), first)
            return Place(self.key, first - rows.start * row, (last - first,), (1,)), (
                first - self.offset
            )
        if self.shape[0] == shape[0] and self.strides[0] == row:
            inner = self.shape[1:]
            place = Place(self.key, self.offset, (len(rows), *inner), self.strides)
            return place, rows.start * prod(inner)
        return None


def _is_contiguous(place: Place) -> bool:
    expected = 1
    for size, stride in zip(reversed(place.shape), reversed(place.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@dataclass(frozen=True)
class Tensor:
    """A Hugging Face tensor, and the parts of it on disk.

    Attributes:
        key: its name.
        spec: its dtype and shape.
        parts: what to fill it with; nothing where it is empty.
        copies: what must hold the same bits: replicas.
        aliases: further names of it.
    """

    key: str
    spec: TensorSpec
    parts: tuple[tuple[Stored, Place], ...]
    copies: tuple[tuple[Stored, Place], ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def stored(self) -> tuple[tuple[Stored, Place], ...]:
        """All that is read of it."""
        return (*self.parts, *self.copies)


@dataclass(frozen=True)
class Target:
    """A layout and degree, to read or to write.

    Attributes:
        layout: the layout's name.
        degree: of tensor parallelism; None for full tensors.
        table: the family's; None for Hugging Face's own layout.
        heads: the number of attention heads, or None where nothing is cut by heads.
        held: what ranks hold, where that is given; None where it follows the layout's own rule.
    """

    layout: LayoutName
    degree: int | None = None
    table: Table | None = None
    heads: int | None = None
    held: Sequence[StateDict] | None = None

    def places(
        self, specs: Mapping[str, TensorSpec], aliases: Mapping[str, str] | None = None
    ) -> list[dict[str, Place]]:
        """By rank and key, where the parts lie in Hugging Face's tensors.

        Args:
            specs: Hugging Face's tensors.
            aliases: further names, each with the one under which `specs` has the tensor.

        Raises:
            ValueError: all keys that are missing, unknown or of the wrong shape.
        """
        hf = {key: meta(spec) for key, spec in specs.items()}
        keys = {id(whole): key for key, whole in hf.items()}
        hf |= {name: hf[kept] for name, kept in (aliases or {}).items()}
        return [{key: _place(part, keys) for key, part in rank.items()} for rank in self._parts(hf)]

    def _parts(self, hf: StateDict) -> list[StateDict]:
        if self.layout == "hf":
            return [hf]
        assert self.table is not None
        if self.layout == "tensorpar":
            heads = num_heads({"num_heads": self.heads})
            ours = translate_from_hf(self.table, hf, heads)
            return split_tensors(ours, Layouts(self.table.family, heads), self.degree or 1)
        smd = translate_hf_to_smdistributed(self.table, hf)
        if self.degree is None:
            return [smd]
        return split_partial(self.table, smd, self.degree, self._sizes)

    def _sizes(self, key: str, axis: str, dim: int, size: int) -> list[int]:
        """What partial files hold, or smdistributed's own way to cut what does not divide."""
        if self.held is not None:
            return [rank[key].shape[dim] for rank in self.held]
        assert self.degree is not None
        if axis != "a":
            return even_sizes(size, self.degree)
        heads = num_heads({"num_heads": self.heads})
        if size % heads:
            raise ValueError(f"{key} has {axis} = {size}, required: a multiple of {heads} heads")
        return [heads_held * (size // heads) for heads_held in even_sizes(heads, self.degree)]


def _place(part: torch.Tensor, keys: Mapping[int, str]) -> Place:
    """Where a view lies, given by identity the keys of what it may be a view of."""
    whole = part if part._base is None else part._base
    assert id(whole) in keys, "a layout's parts are views"
    key = keys[id(whole)]
    return Place(key, int(part.storage_offset()), tuple(part.shape), part.stride())


def tensors_of(checkpoint: Checkpoint) -> list[Tensor]:
    """Every Hugging Face tensor that a checkpoint makes up, and from which of its parts.

    Raises:
        ValueError: all keys that are missing, unknown or of the wrong shape.
    """
    specs = _hf_specs(checkpoint)
    places = _own_target(checkpoint).places(specs)
    parts: dict[str, dict[Place, Stored]] = {key: {} for key in specs}
    copies: dict[str, list[tuple[Stored, Place]]] = {key: [] for key in specs}
    problems = []
    for rank, (keys, of_rank) in enumerate(zip(checkpoint.ranks, places, strict=True)):
        for key, (stored, *others) in keys.items():
            if (place := of_rank.get(key)) is None:
                continue  # a buffer of old versions, which was dropped
            if stored.spec.shape != place.shape:
                shape = stored.spec.shape
                problems.append(f"{key} of rank {rank} has shape {shape}, required {place.shape}")
            if any(other.spec != stored.spec for other in others):
                problems.append(f"{key} differs between pipeline ranks")
            if parts[place.key].setdefault(place, stored) is not stored:
                others = [stored, *others]
            copies[place.key] += [(other, place) for other in others]
    for key, spec in specs.items():
        if sum(prod(place.shape) for place in parts[key]) != prod(spec.shape):
            problems.append(f"{key} is not complete")
    refuse(f"{checkpoint.path} cannot be put together", problems)
    return [
        Tensor(
            key,
            specs[key],
            tuple((stored, place) for place, stored in parts[key].items()),
            # sharded files have a checksum of every replica, which were compared already
            () if checkpoint.headers else tuple(copies[key]),
            aliases,
        )
        for key, aliases in _with_aliases(parts).items()
    ]


def _own_target(checkpoint: Checkpoint) -> Target:
    if checkpoint.layout == "hf":
        return Target("hf")
    degree = len(checkpoint.ranks) if checkpoint.partial else None
    heads = None if checkpoint.config is None else num_heads(checkpoint.config)
    held = checkpoint.shapes()
    return Target(checkpoint.layout, degree, checkpoint.table, heads, held)


def _hf_specs(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    if checkpoint.headers:
        slices, ties = checkpoint.headers[0].slices, checkpoint.headers[0].ties
        dtypes = checkpoint.headers[0].dtypes
        whole = {key: meta(TensorSpec(dtypes[key], part.shape)) for key, part in slices.items()}
        shapes = [whole | {name: torch.empty_like(whole[kept]) for name, kept in ties.items()}]
    else:
        shapes = checkpoint.shapes()
    if checkpoint.layout == "hf":
        table = None if checkpoint.family is None else checkpoint.table
        hf = {key: x for key, x in shapes[0].items() if table is None or not table.drops(key)}
    else:
        full = shapes if checkpoint.partial and len(shapes) > 1 else shapes[0]
        hf = translate_to_hf(checkpoint.table, full, None, checkpoint.config)
    first: dict[int, str] = {}
    for key, tensor in hf.items():
        first.setdefault(id(tensor), key)  # a head that was added as the embedding's other name
    return {key: TensorSpec(hf[key].dtype, tuple(hf[key].shape)) for key in first.values()}


def _with_aliases(parts: Mapping[str, Mapping[Place, Stored]]) -> dict[str, tuple[str, ...]]:
    """Each tensor once, with the other names under which the same bytes of files stand."""
    first: dict[object, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for key, of_key in parts.items():
        same = tuple(
            (id(stored), place.offset, place.shape, place.strides)
            for place, stored in of_key.items()
        )
        kept = first.setdefault(same, key)
        aliases[kept] = (*aliases[kept], key) if kept != key else ()
    return aliases
