"""GPT-2 in smdistributed's layout: keys and shapes typed from its table, values by index.

Nothing here reads the product's table: H = 6, N = 3, I = 7, V = 11, P = 5, L = 2.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tensorpar.translators.gpt2 import (
    translate_hf_state_dict_to_smdistributed_gpt2,
    translate_hf_state_dict_to_smdistributed_gpt2_layer,
    translate_state_dict_to_hf_gpt2,
    translate_state_dict_to_hf_gpt2_layer,
)
from tests.families import FAMILIES, gpt2_config

H, I, V, P, L = 6, 7, 11, 5, 2  # noqa: E741  (the symbols of the format)

LAYER = {
    "attention.pre_layernorm.weight": (H,),
    "attention.pre_layernorm.bias": (H,),
    "attention.query.weight": (H, H),
    "attention.query.bias": (H,),
    "attention.key.weight": (H, H),
    "attention.key.bias": (H,),
    "attention.value.weight": (H, H),
    "attention.value.bias": (H,),
    "attention.dense.weight": (H, H),
    "attention.dense.bias": (H,),
    "output.pre_layernorm.weight": (H,),
    "output.pre_layernorm.bias": (H,),
    "output.dense1.weight": (I, H),
    "output.dense1.bias": (I,),
    "output.dense2.weight": (H, I),
    "output.dense2.bias": (H,),
}
CROSS = {
    f"cross_attention.{name}.{kind}": (H, H) if kind == "weight" else (H,)
    for name in ("query", "key", "value", "dense")
    for kind in ("weight", "bias")
} | {"cross_attention.pre_layernorm.weight": (H,), "cross_attention.pre_layernorm.bias": (H,)}
FULL = {
    "word_embedding.weight": (V, H),
    "position_embedding.weight": (P, H),
    "transformer.seq_layers.1.output.layernorm.weight": (H,),
    "transformer.seq_layers.1.output.layernorm.bias": (H,),
    "lm_head.weight": (V, H),
} | {f"transformer.seq_layers.{i}.{key}": shape for i in range(L) for key, shape in LAYER.items()}

# smdistributed's key in a layer, its axes, and the Hugging Face element at an index of them
ELEMENTS = [
    ("attention.pre_layernorm.weight", lambda hf, x: hf["ln_1.weight"][x]),
    ("attention.pre_layernorm.bias", lambda hf, x: hf["ln_1.bias"][x]),
    ("attention.query.weight", lambda hf, o, i: hf["attn.c_attn.weight"][i, o]),
    ("attention.key.weight", lambda hf, o, i: hf["attn.c_attn.weight"][i, H + o]),
    ("attention.value.weight", lambda hf, o, i: hf["attn.c_attn.weight"][i, 2 * H + o]),
    ("attention.query.bias", lambda hf, o: hf["attn.c_attn.bias"][o]),
    ("attention.key.bias", lambda hf, o: hf["attn.c_attn.bias"][H + o]),
    ("attention.value.bias", lambda hf, o: hf["attn.c_attn.bias"][2 * H + o]),
    ("attention.dense.weight", lambda hf, o, i: hf["attn.c_proj.weight"][i, o]),
    ("attention.dense.bias", lambda hf, o: hf["attn.c_proj.bias"][o]),
    ("output.pre_layernorm.weight", lambda hf, x: hf["ln_2.weight"][x]),
    ("output.pre_layernorm.bias", lambda hf, x: hf["ln_2.bias"][x]),
    ("output.dense1.weight", lambda hf, o, i: hf["mlp.c_fc.weight"][i, o]),
    ("output.dense1.bias", lambda hf, o: hf["mlp.c_fc.bias"][o]),
    ("output.dense2.weight", lambda hf, o, i: hf["mlp.c_proj.weight"][i, o]),
    ("output.dense2.bias", lambda hf, o: hf["mlp.c_proj.bias"][o]),
    ("cross_attention.pre_layernorm.weight", lambda hf, x: hf["ln_cross_attn.weight"][x]),
    ("cross_attention.pre_layernorm.bias", lambda hf, x: hf["ln_cross_attn.bias"][x]),
    ("cross_attention.query.weight", lambda hf, o, i: hf["crossattention.q_attn.weight"][i, o]),
    ("cross_attention.query.bias", lambda hf, o: hf["crossattention.q_attn.bias"][o]),
    ("cross_attention.key.weight", lambda hf, o, i: hf["crossattention.c_attn.weight"][i, o]),
    ("cross_attention.value.weight", lambda hf, o, i: hf["crossattention.c_attn.weight"][i, H + o]),
    ("cross_attention.key.bias", lambda hf, o: hf["crossattention.c_attn.bias"][o]),
    ("cross_attention.value.bias", lambda hf, o: hf["crossattention.c_attn.bias"][H + o]),
    ("cross_attention.dense.weight", lambda hf, o, i: hf["crossattention.c_proj.weight"][i, o]),
    ("cross_attention.dense.bias", lambda hf, o: hf["crossattention.c_proj.bias"][o]),
]


def hf_dict(**changes) -> dict[str, torch.Tensor]:
    """A GPT2LMHeadModel's state dict."""
    config = gpt2_config(layers=L, heads=3, head_size=2, inner=I, vocab=V, positions=P, **changes)
    return FAMILIES[0].state_dict(config)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


@pytest.fixture(scope="module")
def hf():
    return hf_dict()


@pytest.fixture(scope="module")
def smd(hf):
    return translate_hf_state_dict_to_smdistributed_gpt2(hf)


def test_keys_and_shapes(smd):
    """Those of the table, and no others."""
    assert {key: tuple(tensor.shape) for key, tensor in smd.items()} == FULL


def test_cross_attention_keeps_the_scheme():
    """Under `cross_attention`, beside the layer's own keys."""
    smd = translate_hf_state_dict_to_smdistributed_gpt2(hf_dict(add_cross_attention=True))
    cross = {f"transformer.seq_layers.{i}.{key}": CROSS[key] for i in range(L) for key in CROSS}
    assert {key: tuple(tensor.shape) for key, tensor in smd.items()} == FULL | cross


@pytest.mark.parametrize(("key", "element"), ELEMENTS, ids=[key for key, _ in ELEMENTS])
def test_every_element_of_a_layer(key, element):
    """By index into Hugging Face's tensor, in the second layer."""
    whole = hf_dict(add_cross_attention=True)
    smd = translate_hf_state_dict_to_smdistributed_gpt2(whole)
    ours = smd[f"transformer.seq_layers.1.{key}"]
    layer = {name.removeprefix("transformer.h.1."): tensor for name, tensor in whole.items()}
    for index in product(*map(range, ours.shape)):
        assert ours[index] == element(layer, *index)


def test_every_element_outside_the_layers(hf, smd):
    """Embeddings, the last norm, and the tied head under both names."""
    for theirs, ours in {
        "transformer.wte.weight": "word_embedding.weight",
        "transformer.wpe.weight": "position_embedding.weight",
        "transformer.ln_f.weight": "transformer.seq_layers.1.output.layernorm.weight",
        "transformer.ln_f.bias": "transformer.seq_layers.1.output.layernorm.bias",
        "lm_head.weight": "lm_head.weight",
    }.items():
        assert torch.equal(hf[theirs], smd[ours])


@pytest.mark.parametrize("cross", [False, True])
def test_there_and_back(cross):
    """The identity."""
    hf = hf_dict(add_cross_attention=cross)
    assert_same(
        translate_state_dict_to_hf_gpt2(translate_hf_state_dict_to_smdistributed_gpt2(hf)), hf
    )


def test_the_tied_head_is_written_under_both_names(hf, smd):
    """Whether or not a file has it."""
    without = {key: tensor for key, tensor in hf.items() if key != "lm_head.weight"}
    assert_same(translate_hf_state_dict_to_smdistributed_gpt2(without), smd)


def test_a_base_model_has_no_prefix_and_no_head(hf, smd):
    """Its keys lack `transformer.`; it comes back as it was."""
    base = {
        key.removeprefix("transformer."): tensor for key, tensor in hf.items() if "lm_" not in key
    }
    translated = translate_hf_state_dict_to_smdistributed_gpt2(base)
    assert_same(translated, {key: t for key, t in smd.items() if key != "lm_head.weight"})
    assert_same(translate_state_dict_to_hf_gpt2(translated), base)


@pytest.mark.parametrize("head", ["score.weight", "classifier.weight", "qa_outputs.bias"])
def test_other_heads_pass_through(hf, head):
    """And get no language modelling head beside them."""
    trunk = {key: tensor for key, tensor in hf.items() if key != "lm_head.weight"}
    other = {**trunk, head: torch.ones(2, H)}
    translated = translate_hf_state_dict_to_smdistributed_gpt2(other)
    assert torch.equal(translated[head], other[head])
    assert "lm_head.weight" not in translated
    assert_same(translate_state_dict_to_hf_gpt2(translated), other)


def test_layer_only_keeps_the_containers(hf):
    """Only what is in a layer changes; both directions, also as told apart by keys."""
    layers = translate_hf_state_dict_to_smdistributed_gpt2_layer(hf)
    expected = {f"transformer.h.{i}.{key}": shape for i in range(L) for key, shape in LAYER.items()}
    unchanged = [key for key in hf if ".h." not in key]
    expected |= {key: tuple(hf[key].shape) for key in unchanged}
    assert {key: tuple(tensor.shape) for key, tensor in layers.items()} == expected
    key = layers["transformer.h.0.attention.key.weight"]
    assert torch.equal(key, hf["transformer.h.0.attn.c_attn.weight"][:, H : 2 * H].T)
    assert_same(translate_state_dict_to_hf_gpt2_layer(layers), hf)
    assert_same(translate_state_dict_to_hf_gpt2(layers), hf)
