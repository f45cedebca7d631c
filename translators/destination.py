"""What a checkpoint in a given layout and degree consists of: files, and where their parts lie."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensorpar.files.safetensors_header import TensorSpec
from tensorpar.files.sharded_format import RankHeader, slice_of

from .assembly import Place, Target, Tensor
from .layouts import Layouts
from .out_files import OutFile, SafetensorsFile, ShardedFile, TorchFile
from .rank_files import FULL_NAME

_UNITS = {"": 1} | {
    f"{prefix}{unit}B": base ** (power + 1)
    for unit, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGT")
}


@dataclass(frozen=True)
class Write:
    """Where a part of a tensor goes.

    Attributes:
        file: the number of the file.
        key: the part's there.
        place: the part.
        dtype: in which it is written.
    """

    file: int
    key: str
    place: Place
    dtype: torch.dtype


@dataclass(frozen=True)
class Destination:
    """All that is to be written.

    Attributes:
        files: with tensors.
        writes: by Hugging Face's key.
        small: names and content of files without tensors.
    """

    files: Sequence[OutFile]
    writes: Mapping[str, Sequence[Write]]
    small: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(spec.num_bytes for file in self.files for spec in file.tensors.values())


def planned(
    tensors: Sequence[Tensor],
    target: Target,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Destination:
    """The plan of a checkpoint; nothing is read or written.

    Args:
        tensors: what it holds.
        target: its layout and degree.
        dtype: of floating-point tensors; None keeps theirs.
        max_shard_size: of a Hugging Face file, in bytes.
        config: the model's, for the headers of sharded files.

    Raises:
        ValueError: tensors that are not those of the target's family.
    """
    specs = {tensor.key: replace(tensor.spec, dtype=_cast(tensor, dtype)) for tensor in tensors}
    ties = {alias: tensor.key for tensor in tensors for alias in tensor.aliases}
    # only smdistributed writes a tied tensor under all its names
    places = target.places(
        {tensor.key: tensor.spec for tensor in tensors},
        ties if target.layout == "smdistributed" else {},
    )
    parts = [
        {key: TensorSpec(specs[place.key].dtype, place.shape) for key, place in rank.items()}
        for rank in places
    ]
    small: dict[str, bytes] = {}
    files: Sequence[OutFile]
    if target.layout == "hf":
        files, small = _hf_files(parts[0], max_shard_size)
    elif target.layout == "tensorpar":
        files = [ShardedFile(one) for one in _headers(places, specs, target, ties, config)]
    else:
        partial = target.degree is not None
        names = [f"model_0_{rank}.pt" if partial else FULL_NAME for rank in range(len(parts))]
        files = [
            TorchFile(name, part, partial=partial) for name, part in zip(names, parts, strict=True)
        ]
    return Destination(files, _writes(files, places, specs), small)


def num_bytes(text: str) -> int:
    """A size such as `5GB` or `300MiB`; raises ValueError for what is none."""
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2] not in _UNITS or not float(found[1]) > 0:
        raise ValueError(f"size = {text!r}, required: a positive number and one of {list(_UNITS)}")
    return int(float(found[1]) * _UNITS[found[2]])


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    own = tensor.spec.dtype
    return dtype if dtype is not None and own.is_floating_point else own


def _hf_files(
    tensors: Mapping[str, TensorSpec], max_shard_size: int | None
) -> tuple[list[OutFile], dict[str, bytes]]:
    """One file, or several with an index, none above the size unless one tensor is."""
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for key, spec in tensors.items():
        if groups[-1] and max_shard_size is not None and size + spec.num_bytes > max_shard_size:
            groups.append({})
            size = 0
        groups[-1][key] = spec
        size += spec.num_bytes
    if len(groups) == 1:
        return [SafetensorsFile("model.safetensors", groups[0])], {}
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
    total = sum(spec.num_bytes for spec in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    files: list[OutFile] = [
        SafetensorsFile(name, group) for name, group in zip(names, groups, strict=True)
    ]
    return files, {"model.safetensors.index.json": (json.dumps(index, indent=2) + "\n").encode()}


def _headers(
    places: Sequence[Mapping[str, Place]],
    specs: Mapping[str, TensorSpec],
    target: Target,
    ties: Mapping[str, str],
    config: Mapping[str, Any] | None,
) -> list[RankHeader]:
    assert target.table is not None
    layouts = Layouts(target.table.family, target.heads)
    shapes, dims = {}, {}
    for key in places[0]:
        entry = layouts.find(key)
        dim = dims[key] = None if entry is None else entry.layout.shard_dim
        shape = list(places[0][key].shape)
        if dim is not None:
            shape[dim] = sum(rank[key].shape[dim] for rank in places)
        shapes[key] = shape
    dtypes = {key: specs[place.key].dtype for key, place in places[0].items()}
    degree = len(places)
    return [
        RankHeader(
            rank,
            degree,
            {key: slice_of(shapes[key], dims[key], degree, rank) for key in shapes},
            dtypes,
            ties,
            config,
        )
        for rank in range(degree)
    ]


def _writes(
    files: Sequence[OutFile],
    places: Sequence[Mapping[str, Place]],
    specs: Mapping[str, TensorSpec],
) -> dict[str, list[Write]]:
    writes: dict[str, list[Write]] = {key: [] for key in specs}
    for number, file in enumerate(files):
        rank = places[number] if len(places) == len(files) else places[0]
        for key in file.tensors:
            place = rank[key]
            writes[place.key].append(Write(number, key, place, specs[place.key].dtype))
    return writes
