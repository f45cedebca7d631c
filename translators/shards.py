"""Full dicts and dicts of one rank each, in tensorpar layout: partition, and nothing of layout.

No process group is needed: the ranks are virtual. Parameters that no plan touches are replicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tensorpar.partition import shard, unshard

from .layouts import Layouts, family_of, num_heads
from .problems import refuse
from .tensors import StateDict, bit_identical, opened


def split(full: Mapping[str, Any], config: Any, tp_degree: int) -> list[dict[str, Any]]:
    """Cut a full state dict into one per tensor-parallel rank.

    Args:
        full: in tensorpar layout; tensors or NumPy arrays.
        config: the model's, as a Transformers config or a mapping.
        tp_degree: the number of ranks; sizes need not divide.

    Returns:
        One dict per rank, all with the keys of `full`. The tensors are views of `full`'s; clone
        them before `torch.save`, which otherwise writes all of what they are views of.

    Raises:
        ValueError: tensors that do not have tensorpar layout, all of them; a wrong `tp_degree`.
    """
    check_degree(tp_degree)
    tensors, restore = opened(full)
    shards = split_tensors(tensors, layouts_of(config), tp_degree)
    return [restore(part) for part in shards]


def merge(shards: Sequence[Mapping[str, Any]], config: Any) -> dict[str, Any]:
    """The inverse of `split`: put the dicts of all ranks together.

    Args:
        shards: one dict per tensor-parallel rank, in order; no DTensors.
        config: as for `split`.

    Raises:
        ValueError: everything by which the dicts are not those of one model: keys that some lack,
            replicated parameters that are not bit-identical, shards that do not join.
    """
    tensors, restores = zip(*(opened(part, dtensors=False) for part in _some(shards)), strict=True)
    return restores[0](merge_tensors(tensors, layouts_of(config)))


def reshard(
    shards: Sequence[Mapping[str, Any]], config: Any, tp_degree: int
) -> list[dict[str, Any]]:
    """The dicts of all ranks at one degree to those at another; raises what both halves raise.

    Args:
        shards: one dict per tensor-parallel rank, in order; no DTensors.
        config: as for `split`.
        tp_degree: the new number of ranks.
    """
    check_degree(tp_degree)
    return split(merge(shards, config), config, tp_degree)


def layouts_of(config: Any) -> Layouts:
    """The layouts of a model, with its number of heads."""
    return Layouts(family_of(config), num_heads(config))


def check_degree(tp_degree: int) -> None:
    """Raise ValueError unless `tp_degree` is a positive integer."""
    if not isinstance(tp_degree, int) or tp_degree < 1:
        raise ValueError(f"tp_degree = {tp_degree!r}, required: a positive integer")


def split_tensors(full: StateDict, layouts: Layouts, tp_degree: int) -> list[StateDict]:
    """`split` of plain tensors."""
    refuse("the state dict cannot be split", layouts.misfits(full, full))
    shards: list[StateDict] = [{} for _ in range(tp_degree)]
    for key, tensor in full.items():
        dim = _shard_dim(layouts, key)
        parts = [tensor] * tp_degree if dim is None else shard(tensor, dim, tp_degree)
        for part, own in zip(parts, shards, strict=True):
            own[key] = part
    return shards


def merge_tensors(shards: Sequence[StateDict], layouts: Layouts) -> StateDict:
    """`merge` of plain tensors; results are on the device of the first rank's."""
    what = f"the state dicts of {len(shards)} ranks cannot be merged"
    keys = list(dict.fromkeys(key for part in shards for key in part))
    absent = {key: [rank for rank, part in enumerate(shards) if key not in part] for key in keys}
    refuse(what, [f"{key} is absent on ranks {ranks}" for key, ranks in absent.items() if ranks])
    full: StateDict = {}
    problems = []
    for key in keys:
        parts = [part[key] for part in shards]
        try:
            full[key] = join(parts, _shard_dim(layouts, key))
        except ValueError as error:
            problems.append(f"{key}: {error}")
    refuse(what, problems or layouts.misfits(full, full))
    return full


def join(parts: Sequence[torch.Tensor], dim: int | None) -> torch.Tensor:
    """The tensor of which each rank holds a chunk along `dim`, or for None all of it.

    Raises:
        ValueError: copies that differ, dtypes that differ, or chunks that are not of one tensor.
    """
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1:
        raise ValueError(f"dtypes = {sorted(map(str, dtypes))}, required: the same on all ranks")
    if dim is None:
        odd = [rank for rank, part in enumerate(parts) if not bit_identical(parts[0], part)]
        if odd:
            raise ValueError(
                f"ranks {odd} differ from rank 0, required: replicated parameters bit-identical on "
                "all ranks; pass the files of one step of one run"
            )
        return parts[0]
    if any(part.ndim <= dim for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"shapes = {shapes}, required: a dim {dim} to join along")
    return unshard([part.to(parts[0].device) for part in parts], dim)


def _shard_dim(layouts: Layouts, key: str) -> int | None:
    entry = layouts.find(key)
    return None if entry is None else entry.layout.shard_dim


def _some(shards: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if isinstance(shards, Mapping) or not shards:
        raise ValueError("shards = one dict or none, required: a list of one dict per rank")
    return shards
