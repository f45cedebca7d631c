"""What the translators of optimizer state read, and what they refuse: literal keys and shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from tensorpar.moments import read
from tensorpar.translators import (
    hf_to_smdistributed,
    merge_optimizer,
    optimizer_from_hf,
    optimizer_to_hf,
    split_optimizer,
)
from tests.families import CASES

CONFIG = CASES["gpt2"].config(layers=1, heads=3, head_size=2, inner=5, vocab=7, positions=4)
QKV, BIAS = "transformer.h.0.attn.c_attn.weight", "transformer.ln_f.bias"


def state_dict() -> dict:
    """One matrix and one bias, by index, with names."""
    moment = torch.arange(6 * 18.0).reshape(6, 18)
    return {
        "state": {
            0: {"step": torch.tensor(2.0), "exp_avg": moment, "exp_avg_sq": moment + 1000},
            1: {
                "step": torch.tensor(2.0),
                "exp_avg": torch.arange(6.0),
                "exp_avg_sq": torch.ones(6),
            },
        },
        "param_groups": [{"lr": 0.1, "params": [0, 1], "param_names": [QKV, BIAS]}],
    }


def changed(change) -> dict:
    """The dict after `change`."""
    spoiled = copy.deepcopy(state_dict())
    change(spoiled)
    return spoiled


def refusal(call, *args, **kwargs) -> str:
    """The message with which a call is refused."""
    with pytest.raises(ValueError, match=r"required|problem") as error:
        call(*args, **kwargs)
    return str(error.value)


def test_fused_moments_by_index_arithmetic():
    """Element [q|k|v, head, d, in] of a rank's moment is column block*6 + head*2 + d of HF's."""
    hf = state_dict()
    first, second = split_optimizer(optimizer_from_hf(hf, CONFIG), CONFIG, 2)
    for kind, offset in (("exp_avg", 0), ("exp_avg_sq", 1000)):
        assert first["state"][0][kind].shape == (3, 2, 2, 6)
        assert second["state"][0][kind].shape == (3, 1, 2, 6)
        # value at HF row `i`, column `c` is 18 i + c
        assert first["state"][0][kind][1, 1, 0, 4] == 18 * 4 + (6 + 2) + offset
        assert second["state"][0][kind][2, 0, 1, 5] == 18 * 5 + (12 + 4 + 1) + offset
    assert torch.equal(second["state"][1]["exp_avg"], torch.arange(6.0))
    assert first["param_groups"] == hf["param_groups"]


def test_names_given_beside_the_dict():
    """torch's own dict, without names, is understood with them, and then tells them itself."""
    bare = changed(lambda s: s["param_groups"][0].pop("param_names"))
    ours = optimizer_from_hf(bare, CONFIG, names=[QKV, BIAS])
    assert ours["param_groups"] == state_dict()["param_groups"]
    assert ours["state"][0]["exp_avg"].shape == (3, 3, 2, 6)
    assert "tells 0 names of 2 parameters" in refusal(optimizer_from_hf, bare, CONFIG)
    assert "names = 1 names, required: 2" in refusal(optimizer_from_hf, bare, CONFIG, names=[QKV])
    told = refusal(optimizer_from_hf, state_dict(), CONFIG, names=[BIAS, QKV])
    assert f"names has '{BIAS}' where the state dict's own param_names have '{QKV}'" in told


def test_input_is_left_alone():
    """No function changes what it is given."""
    given = state_dict()
    optimizer_to_hf(split_optimizer(optimizer_from_hf(given, CONFIG), CONFIG, 3), CONFIG)
    assert given["param_groups"] == state_dict()["param_groups"]
    assert given["state"].keys() == {0, 1}
    assert given["state"][0]["exp_avg"].shape == (6, 18)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("state"), "has ['param_groups'], required: a dict of 'state'"),
        (lambda s: s["state"].update({2: {}}), "2 is in no group"),
        (lambda s: s["param_groups"].append({"params": [1], "param_names": [BIAS]}), "2 times"),
        (lambda s: s["state"][0].update(h={}), f"h of {QKV} is a dict"),
        (
            lambda s: s["state"][0].update(exp_avg=torch.ones(6, 1)),
            f"{QKV} has states of shapes {{'exp_avg': (6, 1), 'exp_avg_sq': (6, 18)}}",
        ),
    ],
)
def test_what_is_no_optimizer_state_is_refused(change, told):
    """Each with what is wrong, and where."""
    assert told in refusal(optimizer_from_hf, changed(change), CONFIG)


def test_factored_states_are_refused_by_name():
    """Adafactor's rows and columns are not of their parameter's shape."""
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.Adafactor(layer.named_parameters())
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    told = refusal(read, optimizer.state_dict())
    assert "1 problem" in told
    assert "weight has states of shapes {'row_var': (4, 1), 'col_var': (1, 3)}" in told
    assert "Adafactor" in told


def test_wrong_layouts_are_refused_with_the_kind_of_moment():
    """A moment in the other layout, or of other heads, is named as such."""
    ours = optimizer_from_hf(state_dict(), CONFIG)
    told = refusal(optimizer_to_hf, state_dict(), CONFIG)
    assert told.startswith(f"exp_avg: this is not a tensorpar state dict, 1 problem: {QKV}")
    assert "exp_avg: " in refusal(optimizer_from_hf, ours, CONFIG)
    assert "exp_avg: " in refusal(split_optimizer, state_dict(), CONFIG, 2)
    shards = split_optimizer(ours, CONFIG, 2)
    assert "pass every rank once, in order" in refusal(merge_optimizer, shards[::-1], CONFIG)
    shards[1]["state"][1]["exp_avg_sq"] = torch.zeros(6)
    told = refusal(merge_optimizer, shards, CONFIG)
    assert told.startswith("exp_avg_sq: ")
    assert f"{BIAS}: ranks [1] differ from rank 0" in told
    assert "required: a list" in refusal(merge_optimizer, ours, CONFIG)
    assert "tp_degree = 0" in refusal(split_optimizer, ours, CONFIG, 0)


def test_smdistributed_names_are_refused():
    """That layout fuses and renames parameters, which an optimizer's groups cannot follow."""
    case = CASES["gpt2"]
    names = list(hf_to_smdistributed(case.state_dict(CONFIG), CONFIG))
    given = {"state": {}, "param_groups": [{"params": names}]}
    assert "smdistributed" in refusal(optimizer_to_hf, given, CONFIG)


def test_a_flat_dict_is_refused_with_advice():
    """torch.distributed.checkpoint can also flatten; the option that does not is named."""
    layer = nn.Linear(3, 4)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    given = get_optimizer_state_dict(layer, torch.optim.Adam(layer.parameters()), options=options)
    assert "flatten_optimizer_state_dict=False" in refusal(read, given)
    by_name = get_optimizer_state_dict(layer, torch.optim.Adam(layer.parameters()))
    assert read(by_name).names == ["weight", "bias"]
    assert read(by_name).state_dict() == by_name
