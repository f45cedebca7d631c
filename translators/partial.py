"""smdistributed's partial dicts, one per tensor-parallel rank, put together to a full one.

Slices follow the axes that the table says are cut; the first `n mod t` ranks hold one unit more.
Biases of row-parallel layers are held by the first rank alone, everything else by all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .problems import refuse
from .shards import join
from .smdistributed import match
from .table import Rule, Table
from .tensors import StateDict, bit_identical


def merge_partial(table: Table, dicts: Sequence[StateDict], *, strict: bool = True) -> StateDict:
    """The full dict of which each of `dicts` holds one tensor-parallel rank's part.

    Without `strict`, keys that nobody knows are taken for replicated.

    Raises:
        ValueError: all keys that a rank lacks, that differ where they are replicated, or whose
            slices are not of one tensor.
    """
    what = f"the partial {table.family} state dicts of {len(dicts)} ranks cannot be merged"
    keys = list(dict.fromkeys(key for part in dicts for key in part))
    found = match(table.fitting(keys, "smd"), keys, "smd", strict=strict)
    refuse(what, found.problems)
    rules = {key: one for one in found.rules for key in one.smd}
    full: StateDict = {}
    problems = []
    for key in keys:
        try:
            full[key] = _merged(key, dicts, rules.get(key), table.cut)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    refuse(what, problems)
    return full


def split_partial(
    table: Table, smd: StateDict, degree: int, sizes: Callable[[str, str, int, int], Sequence[int]]
) -> list[StateDict]:
    """The inverse of `merge_partial`: what each of `degree` ranks holds, as views.

    Args:
        table: the variant that the keys are of.
        smd: a full dict.
        degree: the number of tensor-parallel ranks.
        sizes: by key, axis, its dim and length, how much of it each rank holds.
    """
    found = match(table.fitting(smd, "smd"), smd, "smd")
    rules = {key: one for one in found.rules for key in one.smd}
    ranks: list[StateDict] = [{} for _ in range(degree)]
    for key, tensor in smd.items():
        one = rules.get(key)
        if one is not None and one.row_bias:
            ranks[0][key] = tensor
            continue
        dim = cut_dim(one, table.cut)
        if one is None or dim is None:
            parts: Sequence[torch.Tensor] = [tensor] * degree
        else:
            parts = tensor.split(list(sizes(key, one.smd_axes[dim], dim, tensor.shape[dim])), dim)
        for rank, part in zip(ranks, parts, strict=True):
            rank[key] = part
    return ranks


def cut_dim(one: Rule | None, cut: tuple[str, ...]) -> int | None:
    """The dim of which partial files hold slices; None where they hold all."""
    axes = [] if one is None else one.smd_axes
    return next((dim for dim, axis in enumerate(axes) if axis in cut), None)


def even_sizes(count: int, degree: int) -> list[int]:
    """How many of `count` each rank holds: the first ones one more where it does not divide."""
    quotient, extra = divmod(count, degree)
    return [quotient + (rank < extra) for rank in range(degree)]


def union(dicts: Sequence[StateDict]) -> StateDict:
    """The dict of which each of `dicts` holds some keys: the stages of a pipeline.

    Raises:
        ValueError: all keys that several hold with different values.
    """
    whole: StateDict = {}
    problems = []
    for part in dicts:
        for key, tensor in part.items():
            if not bit_identical(whole.setdefault(key, tensor), tensor):
                problems.append(f"{key} differs between pipeline ranks")
    refuse("the pipeline ranks' dicts are not of one model", problems)
    return whole


def _merged(
    key: str, dicts: Sequence[StateDict], one: Rule | None, cut: tuple[str, ...]
) -> torch.Tensor:
    row_bias = one is not None and one.row_bias
    holders = [rank for rank, part in enumerate(dicts) if key in part]
    required = [0] if row_bias else list(range(len(dicts)))
    if holders != required:
        raise ValueError(f"held by ranks {holders}, required: by ranks {required}")
    parts = [dicts[rank][key] for rank in holders]
    axes = [] if one is None else one.smd_axes
    dim = cut_dim(one, cut)
    if dim is None:
        return join(parts, None)
    if any(part.ndim != len(axes) for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"shapes = {shapes}, required: {len(axes)} dims {axes}")
    return _concatenated(parts, dim)


def _concatenated(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    sizes = [part.shape[dim] for part in parts]
    rests = {(part.dtype, *part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}
    if sizes != sorted(sizes, reverse=True) or len(set(sizes)) > 2 or len(rests) > 1:
        shapes = [(part.dtype, tuple(part.shape)) for part in parts]
        raise ValueError(
            f"shapes = {shapes}, required: slices along dim {dim}, the larger ones first and the "
            "rest alike; pass every tensor-parallel rank once, in order"
        )
    return torch.cat([part.to(parts[0].device) for part in parts], dim)
