"""The laws of optimizer state, over families, random tiny configs, groups and degrees; bit for bit.

The reference for a moment is its parameter: a moment that holds the weight's own values must go
where the weight goes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorpar.translators import (
    from_hf,
    merge_optimizer,
    optimizer_from_hf,
    optimizer_to_hf,
    reshard_optimizer,
    split,
    split_optimizer,
)
from tests.families import FAMILIES, FamilyCase
from tests.strategies import tiny_configs, world_sizes

every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
#: the engine has laws of its own with more; an example here is a model and three translations.
few = settings(max_examples=25)


#: what optimizers keep moments in; torch computes with these, unlike with float8.
KEPT_IN = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def optimizers(draw: st.DrawFn, case: FamilyCase) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A config, a state dict in Hugging Face's layout, and an optimizer's over its parameters.

    Its `like` holds the weights themselves, other moments other values; parameters are dealt out
    to two groups at random, some have no state, and keys are indices or names.
    """
    config = draw(tiny_configs(case))
    weights = case.state_dict(config, draw(st.sampled_from(KEPT_IN)))
    once = {id(tensor): name for name, tensor in reversed(weights.items())}  # ties under one name
    names = draw(st.permutations(list(once.values())))
    frozen = draw(st.sets(st.sampled_from(names), max_size=2))
    cut = draw(st.integers(0, len(names)))
    state = {
        name: {"step": torch.tensor(3.0 + i), "like": x, "other": (x.float() * 2 + i).to(x.dtype)}
        for i, (name, x) in enumerate((name, weights[name]) for name in names)
        if name not in frozen
    }
    groups: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.9, 0.99), "params": names[:cut]},
        {"lr": 0.2, "betas": (0.8, 0.99), "params": names[cut:]},
    ]
    if draw(st.booleans()):
        index = {name: i for i, name in enumerate(names)}
        state = {index[name]: values for name, values in state.items()}
        for group in groups:
            group["param_names"] = group["params"]
            group["params"] = [index[name] for name in group["params"]]
    return config, weights, {"state": state, "param_groups": groups}


def names_of(state_dict: dict[str, Any]) -> dict[Any, str]:
    """Key to name of every parameter."""
    pairs: dict[Any, str] = {}
    for group in state_dict["param_groups"]:
        pairs |= dict(zip(group["params"], group.get("param_names", group["params"]), strict=True))
    return pairs


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Equal options, and every value of the same bits."""
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for key, values in left["state"].items():
        assert values.keys() == right["state"][key].keys()
        for kind, value in values.items():
            other = right["state"][key][kind]
            assert (value.shape, value.dtype) == (other.shape, other.dtype)
            assert torch.equal(value, other), (key, kind)


@every_family
@few
@given(st.data(), world_sizes(), world_sizes())
def test_law_commute_and_reshard(case: FamilyCase, data, a, b):
    """to_hf(reshard(split(from_hf(s), a), b)) == s, and reshard(split(x, a), b) == split(x, b)"""
    config, _, s = data.draw(optimizers(case))
    x = optimizer_from_hf(s, config)
    assert_same(optimizer_to_hf(x, config), s)
    shards = split_optimizer(x, config, a)
    assert_same(merge_optimizer(shards, config), x)
    resharded = reshard_optimizer(shards, config, b)
    for left, right in zip(resharded, split_optimizer(x, config, b), strict=True):
        assert_same(left, right)
    assert_same(optimizer_to_hf(resharded, config), s)


@every_family
@few
@given(st.data(), world_sizes())
def test_law_moments_follow_their_parameters(case: FamilyCase, data, n):
    """A moment with the values of its weight is the weight's shard on every rank."""
    config, weights, s = data.draw(optimizers(case))
    names = names_of(s)
    ranks = split_optimizer(optimizer_from_hf(s, config), config, n)
    for ours, its in zip(split(from_hf(weights, config), config, n), ranks, strict=True):
        for key, values in its["state"].items():
            assert torch.equal(values["like"], ours[names[key]])
            assert torch.equal(values["step"], s["state"][key]["step"])
            assert values["like"].is_contiguous()


@every_family
@few
@given(st.data(), world_sizes())
def test_law_refusal_of_ranks_that_differ(case: FamilyCase, data, n):
    """A state that one rank lacks, another step, other options: refused and named."""
    config, _, s = data.draw(optimizers(case))
    rank = data.draw(st.integers(1, n))
    key = data.draw(st.sampled_from(sorted(s["state"], key=str)))
    name = names_of(s)[key]
    kind = data.draw(st.sampled_from(["like", "other", "step"]))

    def refused(spoil) -> str:
        shards = split_optimizer(optimizer_from_hf(s, config), config, n + 1)
        spoil(shards[rank])
        with pytest.raises(ValueError, match="ranks cannot be merged") as error:
            merge_optimizer(shards, config)
        return str(error.value)

    told = refused(lambda part: part["state"][key].pop(kind))
    assert name in told
    assert kind in told
    told = refused(lambda part: part["state"][key].update(step=torch.tensor(99.0)))
    assert f"{name} step = 99.0 on rank {rank}" in told
    told = refused(lambda part: part["param_groups"][1].update(lr=0.3))
    assert f"lr of group 1 = 0.3 on rank {rank}, 0.2 on rank 0" in told
