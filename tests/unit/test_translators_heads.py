"""Every class of models of every family, through both layouts and back."""

from __future__ import annotations

import pytest
import torch
import transformers

from tensorpar.translators import (
    from_hf,
    hf_to_smdistributed,
    merge,
    reshard,
    smdistributed_to_hf,
    split,
    to_hf,
)
from tests.families import CASES, FAMILIES, FamilyCase

every_class = pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in FAMILIES for name in (case.model, *case.heads)],
    ids=lambda one: one.name if isinstance(one, FamilyCase) else one,
)
prefixed = pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("gpt2", "transformer."),
        ("bert", "bert."),
        ("roberta", "roberta."),
        ("gptj", "transformer."),
        ("gptneo", "transformer."),
    ],
)
BERTS = pytest.mark.parametrize("name", ["bert", "roberta"])


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert (key, tensor.dtype) == (key, right[key].dtype)
        assert torch.equal(tensor, right[key]), key


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_and_loaded(case, name, dtype):
    """Bit for bit, also through ranks; Transformers takes the result strictly."""
    config = case.config(**case.variants[-1 if "LMHead" in name else 0])
    hf = case.state_dict(config, dtype, name)
    shards = split(from_hf(hf, config), config, 3)
    again = reshard(shards, config, 2)
    for back in (
        to_hf(from_hf(hf, config), config),
        to_hf(merge(again, config), config),
        to_hf(again, config),
        smdistributed_to_hf(hf_to_smdistributed(hf, config), config),
    ):
        assert_same(back, hf)
        model = getattr(transformers, name)(config).to(dtype)
        model.load_state_dict(back, strict=True)
        assert_same(model.state_dict(), hf)


@every_class
def test_a_models_layout_is_told_by_its_keys(case, name):
    """Each sharded parameter is cut, whatever head is on top; all other tensors are replicated."""
    config = case.config()
    ours = from_hf(case.state_dict(config, model=name), config)
    first = split(ours, config, 5)[0]
    cut = {key for key in ours if first[key].shape != ours[key].shape}
    marks = ("q_", "k_", "v_", "c_attn", "c_fc.", "fc_in", "query", "key", "value", "intermediate")
    rows = ("c_proj.weight", "out_proj.weight", "fc_out.weight", "output.dense.weight")
    vocabulary = ("wte.", "word_embeddings.", "decoder.", "predictions.bias", "lm_head.bias")
    expected = {
        key
        for key in ours
        if ".h." in f".{key}" or ".layer." in key
        if any(mark in key for mark in (*marks, *rows))
    } | {key for key in ours if any(f".{mark}" in f".{key}" for mark in vocabulary)}
    assert cut == expected | {key for key in ours if key == "lm_head.weight"}


@prefixed
def test_base_models_have_no_prefix(name, prefix):
    """Nor have they in our layout; in smdistributed's BERT loses it, the others never had it."""
    case = CASES[name]
    config = case.config(**case.variants[-1])
    hf = case.state_dict(config)
    base = {
        key.removeprefix(prefix): tensor for key, tensor in hf.items() if key.startswith(prefix)
    }
    smd, full = hf_to_smdistributed(base, config), hf_to_smdistributed(hf, config)
    assert_same(to_hf(from_hf(base, config), config), base)
    assert_same(smdistributed_to_hf(smd, config), base)
    heads = ("lm_head.", "cls.")
    expected = {key: tensor for key, tensor in full.items() if not key.startswith(heads)}
    if prefix != "transformer.":
        expected = {key.removeprefix(prefix): tensor for key, tensor in expected.items()}
    assert_same(smd, expected)


@pytest.mark.parametrize("name", [case.name for case in FAMILIES])
@pytest.mark.parametrize("head", ["classifier.out_proj.weight", "my_head.0.weight", "qa_outputs.b"])
def test_heads_of_any_name_pass_through(name, head):
    """The very tensors, beside a trunk that keeps its prefix."""
    case = CASES[name]
    config = case.config()
    heads = ("lm_head.", "cls.")
    trunk = {k: v for k, v in case.state_dict(config).items() if not k.startswith(heads)}
    hf = {**trunk, head: torch.ones(2, 3, 4)}
    ours, smd = from_hf(hf, config), hf_to_smdistributed(hf, config)
    assert torch.equal(ours[head], hf[head])
    assert torch.equal(smd[head], hf[head])
    assert_same(to_hf(ours, config), hf)
    back = smdistributed_to_hf(smd, config)
    tied = {"lm_head.weight"} & back.keys()
    assert_same({key: tensor for key, tensor in back.items() if key not in tied}, hf)


@BERTS
def test_positions_of_old_versions_are_dropped(name):
    """Current ones keep no such buffer and load nothing with it strictly."""
    case = CASES[name]
    config = case.config()
    hf = case.state_dict(config)
    old = {**hf, f"{name}.embeddings.position_ids": torch.arange(16)[None]}
    smd = {
        **hf_to_smdistributed(hf, config),
        f"{name}.embeddings.position_ids": torch.arange(16)[None],
    }
    assert_same(to_hf(from_hf(old, config), config), hf)
    assert_same(hf_to_smdistributed(old, config), hf_to_smdistributed(hf, config))
    assert_same(smdistributed_to_hf(smd, config), hf)


def test_a_gptj_without_its_head_is_refused():
    """With the prefix in front of every key it is no base model; half a head is none."""
    case = CASES["gptj"]
    config = case.config()
    hf = case.state_dict(config)
    trunk = {key: tensor for key, tensor in hf.items() if "lm_head" not in key}
    with pytest.raises(ValueError, match=r"1 problem: lm_head.weight is missing, or another head"):
        hf_to_smdistributed(trunk, config)
    bias = {**trunk, "lm_head.bias": hf["lm_head.bias"]}
    with pytest.raises(ValueError, match=r"1 problem: lm_head.weight is missing"):
        hf_to_smdistributed(bias, config)
