"""smdistributed's partial dicts, one per tensor-parallel rank, put together to a full one.

Slices follow the axes that the table says are cut; the first `n mod t` ranks hold one unit more.
Biases of row-parallel layers are held by the first rank alone, everything else by all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .problems import refuse
from .shards import join
from .smdistributed import match
from .table import Rule, Table
from .tensors import StateDict, bit_identical


def merge_partial(table: Table, dicts: Sequence[StateDict]) -> StateDict:
    """The full dict of which each of `dicts` holds one tensor-parallel rank's part.

    Raises:
        ValueError: all keys that a rank lacks, that differ where they are replicated, or whose
            slices are not of one tensor.
    """
    what = f"the partial {table.family} state dicts of {len(dicts)} ranks cannot be merged"
    keys = list(dict.fromkeys(key for part in dicts for key in part))
    found = match(table.fitting(keys, "smd"), keys, "smd")
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
    dim = next((dim for dim, axis in enumerate(axes) if axis in cut), None)
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
