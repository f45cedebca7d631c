"""Translation between the three layouts for any family, by its table and its registered plans.

Nothing here knows a rank: a list of per-rank dicts is merged first, next door.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import smdistributed
from .layouts import Layouts, family_of, num_heads
from .partial import merge_partial
from .problems import refuse
from .shards import merge_tensors
from .smdistributed import is_smdistributed
from .table import Table, table_of
from .tensors import StateDict, opened

#: one full dict, or one dict per tensor-parallel rank.
StateDicts = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def to_hf(
    state_dict: StateDicts, config: Any, max_seq_len: int | None = None, *, strict: bool = True
) -> dict[str, Any]:
    """tensorpar's or smdistributed's layout, told apart by their keys, to Hugging Face's.

    Args:
        state_dict: full tensors, or a list of one dict per tensor-parallel rank.
        config: the model's, as a Transformers config or a mapping.
        max_seq_len: also add the causal-mask buffers of old Transformers versions, this long.
        strict: False lets keys pass through that nobody knows.

    Returns:
        A new dict; its tensors are views of the given ones where a view is enough.

    Raises:
        ValueError: all keys that are missing, unknown or of the wrong shape; an unknown family.
    """
    table = table_of(family_of(config))
    return translate_to_hf(table, state_dict, max_seq_len, config, strict=strict)


def from_hf(state_dict: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Hugging Face's layout to tensorpar's.

    Args:
        state_dict: full tensors; keys may lack the base model's prefix.
        config: as for `to_hf`.

    Returns:
        A new dict without the causal-mask buffers of old Transformers versions; its tensors are
        views of the given ones where a view is enough.

    Raises:
        ValueError: all keys of the wrong shape; another layout's keys; an unknown family.
    """
    return translate_from_hf(table_of(family_of(config)), state_dict, num_heads(config))


def smdistributed_to_hf(
    state_dict: StateDicts, config: Any, *, strict: bool = True
) -> dict[str, Any]:
    """smdistributed's layout to Hugging Face's; as `to_hf`, but the layout must be this one."""
    first = _listed(state_dict)[0]
    if not is_smdistributed(first):
        raise ValueError(
            f"keys = {list(first)[:3]}..., required: smdistributed's layout, with keys such as "
            "word_embedding.weight; use to_hf for tensorpar's"
        )
    return translate_to_hf(table_of(family_of(config)), state_dict, strict=strict)


def hf_to_smdistributed(
    state_dict: Mapping[str, Any], config: Any, *, strict: bool = True
) -> dict[str, Any]:
    """Hugging Face's layout to smdistributed's; raises and returns as its inverse does."""
    return translate_hf_to_smdistributed(table_of(family_of(config)), state_dict, strict=strict)


def translate_to_hf(
    table: Table,
    state_dict: StateDicts,
    max_seq_len: int | None = None,
    config: Any = None,
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """`to_hf` of a known family; the config may be unknown."""
    heads = None if config is None else num_heads(config)
    dicts, restores = zip(*map(opened, _listed(state_dict)), strict=True)
    if is_smdistributed(dicts[0]):
        own = variant(table, dicts[0])
        full = merge_partial(own, dicts, strict=strict) if len(dicts) > 1 else dicts[0]
        hf = smdistributed.to_hf(own, full, strict=strict)
    else:
        layouts = Layouts(table.family, heads)
        full = merge_tensors(dicts, layouts) if len(dicts) > 1 else dicts[0]
        hf = _from_tensorpar(layouts, full)
    hf = _without_dropped(table, hf)
    if max_seq_len is not None and table.masks is not None:
        hf |= table.masks.made_for(hf, max_seq_len, config)
    return restores[0](hf)


def translate_from_hf(table: Table, state_dict: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """`from_hf` of a known family."""
    hf, restore = opened(state_dict)
    _require_hf(hf)
    layouts = Layouts(table.family, heads)
    ours: StateDict = {}
    problems = []
    for key, tensor in _without_dropped(table, hf).items():
        entry = layouts.find(key)
        try:
            ours[key] = (
                tensor if entry is None else entry.layout.pattern.apply(tensor, **entry.sizes)
            )
        except ValueError as error:
            problems.append(f"{key}: {error}")
    what = f"this is not a Hugging Face state dict of {table.family} with {heads} heads"
    refuse(what, problems + layouts.misfits(ours, hf))
    return restore(ours)


def translate_hf_to_smdistributed(
    table: Table, state_dict: Mapping[str, Any], *, strict: bool = True
) -> dict[str, Any]:
    """`hf_to_smdistributed` of a known family."""
    hf, restore = opened(state_dict)
    _require_hf(hf)
    return restore(smdistributed.from_hf(table, hf, strict=strict) if hf else hf)


def variant(table: Table, keys: Iterable[str]) -> Table:
    """The table itself, or that of models of which only the layers were distributed."""
    full = (".seq_layers.", "word_embedding.")
    if not table.rules:
        return table
    return table if any(part in key for key in keys for part in full) else table.layers_only()


def _from_tensorpar(layouts: Layouts, ours: StateDict) -> StateDict:
    refuse("this is not a tensorpar state dict", layouts.misfits(ours, ours))
    hf = dict(ours)
    for key, tensor in ours.items():
        if (entry := layouts.find(key)) is not None:
            hf[key] = entry.layout.pattern.inverse.apply(tensor)
    return hf


def _without_dropped(table: Table, hf: StateDict) -> StateDict:
    return {key: tensor for key, tensor in hf.items() if not table.drops(key)}


def _require_hf(state_dict: StateDict) -> None:
    if is_smdistributed(state_dict):
        raise ValueError(
            "the state dict is in smdistributed's layout, required: Hugging Face's; translate it "
            "by translate_state_dict_to_hf_<family> first"
        )


def _listed(state_dict: StateDicts) -> Sequence[Mapping[str, Any]]:
    dicts = [state_dict] if isinstance(state_dict, Mapping) else state_dict
    if not dicts:
        raise ValueError("state_dict = an empty list, required: one dict per tensor-parallel rank")
    return dicts
