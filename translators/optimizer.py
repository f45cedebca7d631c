"""State dicts of optimizers between degrees and layouts; no process group, no model, no optimizer.

A moment has its parameter's name and shape, so all moments of one kind are a state dict, and what
is done to it is what the functions next door do to one. Only what is no moment is new here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from tensorpar.moments import Moments, OptimizerState, read, told

from .layouts import family_of, num_heads
from .problems import refuse
from .shards import check_degree, layouts_of, merge_tensors, split_tensors
from .smdistributed import is_smdistributed
from .table import table_of
from .tensors import bit_identical
from .translate import StateDicts, translate_from_hf, translate_to_hf

Names = Iterable[str] | None


def optimizer_to_hf(state_dict: StateDicts, config: Any, *, names: Names = None) -> dict[str, Any]:
    """An optimizer's state from tensorpar layout to that of an optimizer over the plain model.

    Args:
        state_dict: full, or a list of one dict per tensor-parallel rank; keyed by index as
            `torch.optim.Optimizer.state_dict()` is, or by name.
        config: the model's, as a Transformers config or a mapping.
        names: of the parameters, in the optimizer's order; only for a dict by index that does not
            tell them as `param_names` of its groups.

    Returns:
        A new dict keyed as the given one; by index its groups have `param_names`. Its tensors are
        contiguous, and the given ones where nothing changes.

    Raises:
        ValueError: all states of the wrong shape; names that are not known; ranks that differ.
    """
    if isinstance(state_dict, Mapping):
        full = _read(state_dict, names)
    else:
        full = _merged(state_dict, config, names)
    table = table_of(family_of(config))
    return _result(full, lambda moments: translate_to_hf(table, moments, config=config))


def optimizer_from_hf(
    state_dict: Mapping[str, Any], config: Any, *, names: Names = None
) -> dict[str, Any]:
    """The inverse of `optimizer_to_hf`, which has the arguments; the result is full."""
    table, heads = table_of(family_of(config)), num_heads(config)
    full = _read(state_dict, names)
    return _result(full, lambda moments: translate_from_hf(table, moments, heads))


def split_optimizer(
    full: Mapping[str, Any], config: Any, tp_degree: int, *, names: Names = None
) -> list[dict[str, Any]]:
    """Cut an optimizer's full state in tensorpar layout into one dict per tensor-parallel rank.

    Args:
        full: keyed by index or by name.
        config: as for `optimizer_to_hf`.
        tp_degree: the number of ranks; sizes need not divide.
        names: as for `optimizer_to_hf`.

    Returns:
        One dict per rank, with all options and scalars. What is not cut is the same tensor in all
        of them, and a shard may be a view; clone them before `torch.save`.

    Raises:
        ValueError: all states that do not have tensorpar layout; a wrong `tp_degree`.
    """
    check_degree(tp_degree)
    given, layouts = _read(full, names), layouts_of(config)
    kinds = {
        kind: told(kind, lambda own: split_tensors(own, layouts, tp_degree), moments)
        for kind, moments in given.moments().items()
    }
    return [
        _result(given.with_moments({kind: shards[rank] for kind, shards in kinds.items()}))
        for rank in range(tp_degree)
    ]


def merge_optimizer(
    shards: Sequence[Mapping[str, Any]], config: Any, *, names: Names = None
) -> dict[str, Any]:
    """The inverse of `split_optimizer`: put the dicts of all ranks together.

    Args:
        shards: one dict per tensor-parallel rank, in order, as `local_optimizer_state_dict` returns
            them; no DTensors.
        config: as for `optimizer_to_hf`.
        names: as for `optimizer_to_hf`, the same for all ranks.

    Raises:
        ValueError: everything by which the dicts are not of one optimizer: states that some lack,
            options, scalars or replicated moments that differ, shards that do not join.
    """
    return _result(_merged(shards, config, names))


def reshard_optimizer(
    shards: Sequence[Mapping[str, Any]], config: Any, tp_degree: int, *, names: Names = None
) -> list[dict[str, Any]]:
    """The dicts of all ranks at one degree to those at another; raises what both halves raise.

    Args:
        shards: one dict per tensor-parallel rank, in order; no DTensors.
        config: as for `optimizer_to_hf`.
        tp_degree: the new number of ranks.
        names: as for `optimizer_to_hf`.
    """
    check_degree(tp_degree)
    return split_optimizer(_merged(shards, config, names).state_dict(), config, tp_degree)


def _read(state_dict: Mapping[str, Any], names: Names) -> OptimizerState:
    given = read(state_dict, names)
    given.require_plain()
    if is_smdistributed(given.names):
        raise ValueError(
            f"parameters = {given.names[:3]}..., required: the names of Hugging Face's layout; "
            "smdistributed's optimizer files are not read"
        )
    return given


def _merged(shards: Sequence[Mapping[str, Any]], config: Any, names: Names) -> OptimizerState:
    if isinstance(shards, Mapping) or not shards:
        raise ValueError("shards = one dict or none, required: a list of one dict per rank")
    names = None if names is None else list(names)
    ranks, layouts = [_read(part, names) for part in shards], layouts_of(config)
    _require_one_optimizer(ranks)
    parts = [rank.moments() for rank in ranks]
    kinds = dict.fromkeys(kind for part in parts for kind in part)
    return ranks[0].with_moments(
        {
            kind: told(
                kind,
                lambda own: merge_tensors(own, layouts),
                [part.get(kind, {}) for part in parts],
            )
            for kind in kinds
        }
    )


def _require_one_optimizer(ranks: Sequence[OptimizerState]) -> None:
    """What is not cut must be the same on all ranks: the options, the names, the scalars."""
    problems = []
    first = _facts(ranks[0])
    for number, rank in enumerate(ranks[1:], 1):
        facts = _facts(rank)
        problems += [
            f"{fact} = {facts.get(fact, 'absent')} on rank {number}, {first.get(fact, 'absent')} "
            "on rank 0"
            for fact in dict.fromkeys((*first, *facts))
            if fact not in first or fact not in facts or not _same(first[fact], facts[fact])
        ]
    refuse(f"the optimizer's state dicts of {len(ranks)} ranks cannot be merged", problems)


def _facts(rank: OptimizerState) -> dict[str, Any]:
    options = {
        f"{option} of group {number}": value
        for number, group in enumerate(rank.groups)
        for option, value in group.items()
    }
    return options | rank.scalars()


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return bit_identical(left, right)
    return type(left) is type(right) and bool(left == right)


def _result(
    state: OptimizerState, change: Callable[[Moments], Mapping[str, Any]] = dict
) -> dict[str, Any]:
    """What is handed out: fused optimizers read moments without regard to their strides."""

    def contiguous(moments: Moments) -> dict[str, Any]:
        new = change(moments)
        refuse(
            "not all are parameters", [f"{name} is a mask" for name in moments.keys() - new.keys()]
        )
        return {name: moment.contiguous() for name, moment in new.items()}

    return state.changed(contiguous).state_dict()
