"""Optimizer state that does not fit is refused on every rank, before anything is moved or sent."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

import tensorpar
from tests.conformance.gpt2 import refusal, require_equal_ranks
from tests.conformance.test_optimizer import flat, optimizer_of, parallel_run


def spoiled(saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dicts that do not fit, by what is wrong with them."""
    wrong = {
        kind: copy.deepcopy(saved)
        for kind in (
            "missing",
            "unknown",
            "shape",
            "factored",
            "groups",
            "mixed",
            "smd",
            "by index",
        )
    }
    for kind in ("missing", "by index"):
        wrong[kind]["state"].pop(17)
        wrong[kind]["param_groups"][0]["params"].pop()
        wrong[kind]["param_groups"][0]["param_names"].pop()
    for group in wrong["by index"]["param_groups"]:
        group.pop("param_names")
    wrong["unknown"]["param_groups"][1]["param_names"][2] = "surprise"
    wrong["shape"]["state"][20] = {"exp_avg": torch.zeros(3, 4)}
    wrong["factored"]["state"][20]["row_var"] = torch.zeros(40, 1)
    wrong["groups"]["param_groups"].append({"params": [], "param_names": []})
    one, other = wrong["mixed"]["param_groups"]
    one["param_names"][3], other["param_names"][3] = other["param_names"][3], one["param_names"][3]
    wrong["smd"]["param_groups"][1]["param_names"][0] = "word_embedding.weight"
    return wrong


def told_what_does_not_fit() -> dict[str, str]:
    """The refusals of loading, after which the optimizer is as it was."""
    model, optimizer = parallel_run()
    saved = tensorpar.optimizer_state_dict(model, optimizer)

    def load(given: Any, **options: Any) -> str:
        call = tensorpar.load_optimizer_state_dict
        return refusal(lambda: call(model, optimizer, given, **options))

    told = {kind: load(given) for kind, given in spoiled(saved).items()}
    told["DTensors"] = load(optimizer.state_dict())
    told["layout"] = load(saved, layout="smdistributed")
    told["tensorpar"] = load(saved, layout="tensorpar")
    told["gathered layout"] = refusal(
        lambda: tensorpar.optimizer_state_dict(model, optimizer, layout="auto")
    )
    require_equal_ranks(
        [flat(({}, saved)), flat(({}, tensorpar.optimizer_state_dict(model, optimizer)))]
    )
    foreign = torch.optim.SGD(nn.Linear(2, 3).parameters())
    told["foreign"] = refusal(lambda: tensorpar.optimizer_state_dict(model, foreign))
    weight = model.transformer.wte.weight
    for factored in (torch.optim.SGD([weight]), torch.optim.Adafactor([weight])):
        factored.state[weight] = {"row_var": torch.zeros(97, 1), "col_var": torch.zeros(1, 41)}
        name = type(factored).__name__
        told[name] = refusal(lambda own=factored: tensorpar.optimizer_state_dict(model, own))
    return told


def test_what_does_not_fit_is_refused(ranks):
    """Loading and gathering name the parameter, the state and the shapes; nothing has changed."""
    results = ranks(2).run(told_what_does_not_fit)
    assert results[0] == results[1]
    told = results[0]
    assert "transformer.ln_f.bias is missing" in told["missing"]
    assert "names = 28 names, required: 27" in told["by index"]
    assert "surprise is unknown" in told["unknown"]
    qkv = "transformer.h.0.attn.c_attn.weight"
    assert f"exp_avg of {qkv} has shape (3, 4), required (40, 120)" in told["shape"]
    assert f"{qkv} has states of shapes" in told["factored"]
    assert "3 groups, required 2" in told["groups"]
    assert "no saved group holds the 18 parameters of group 0" in told["mixed"]
    assert "word_embedding.weight is unknown" in told["smd"]
    assert "is a DTensor" in told["DTensors"]
    assert "layout = 'smdistributed', required: one of ('auto', 'hf'" in told["layout"]
    assert f"exp_avg of {qkv} has shape (40, 120), required (3, 5, 8, 40)" in told["tensorpar"]
    assert "layout = 'auto', required: one of ('hf', 'tensorpar')" in told["gathered layout"]
    assert "2 parameters that are not the GPT2LMHeadModel's" in told["foreign"]
    assert "transformer.wte.weight has states of shapes {'row_var'" in told["SGD"]
    assert "col_var of transformer.wte.weight has shape [1, 41], required" in told["Adafactor"]


def unlike_optimizers() -> tuple[str, str]:
    """Ranks that stepped differently, then one that does not call."""
    model, optimizer = parallel_run()
    own = optimizer if tensorpar.tp_rank() == 0 else optimizer_of(model, "amsgrad")
    told = refusal(lambda: tensorpar.optimizer_state_dict(model, own))
    if tensorpar.tp_rank() == 1:
        return told, ""
    wait = timedelta(seconds=0.2)
    late = refusal(
        lambda: tensorpar.optimizer_state_dict(model, optimizer, timeout=wait), TimeoutError
    )
    return told, late


def test_ranks_that_differ_are_told_and_do_not_hang(ranks):
    """Different states, and a rank that stays away, end in an error on every rank that called."""
    (first, late), (second, _) = ranks(2).run(unlike_optimizers)
    assert first == second
    assert "optimizers hold different states" in first
    assert "on rank 0, absent on rank 1" in first
    assert "optimizer_state_dict was not called by ranks [1]" in late


class Stretched(nn.Linear):
    """A replacement of the user's."""


class Plain(nn.Linear):
    """What it replaces."""


def replaced_whole() -> tuple[str, bool]:
    """Hugging Face's layout is refused for replaced modules, tensorpar's works."""
    tensorpar.tp_register_with_module(
        Plain, Stretched, translate_functions=(lambda s: s, lambda s: s)
    )
    try:
        with tensorpar.tensor_parallelism():
            model = nn.Sequential(Plain(3, 4))
    finally:
        tensorpar.unregister(Plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    told = refusal(lambda: tensorpar.optimizer_state_dict(model, optimizer))
    saved = tensorpar.optimizer_state_dict(model, optimizer, layout="tensorpar")
    refusal(lambda: tensorpar.load_optimizer_state_dict(model, optimizer, saved, layout="hf"))
    tensorpar.load_optimizer_state_dict(model, optimizer, saved)
    again = tensorpar.optimizer_state_dict(model, optimizer, layout="tensorpar")
    require_equal_ranks([flat(({}, saved)), flat(({}, again))])
    return told, isinstance(model[0], Stretched)


@pytest.mark.parametrize("size", [1, 2])
def test_modules_that_were_replaced_whole(ranks, size):
    """Their translate functions say nothing of an optimizer; tensorpar layout keeps its state."""
    for told, is_replaced in ranks(size).run(replaced_whole):
        assert is_replaced
        assert "layout = 'hf' with modules that were replaced whole" in told
