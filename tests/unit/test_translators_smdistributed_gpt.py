"""GPT-J and GPT-Neo in smdistributed's layout: keys and shapes typed from its table.

Nothing here reads the product's table: H = 6, N = 3, I = 7, V = 11, P = 5, L = 2.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.families import CASES

H, I, V, P, L = 6, 7, 11, 5, 2  # noqa: E741  (the symbols of the format)

# smdistributed's key, Hugging Face's, and the shape of both
LAYER = {
    "gptj": [
        ("pre_layernorm.weight", "ln_1.weight", (H,)),
        ("pre_layernorm.bias", "ln_1.bias", (H,)),
        ("attention.query.weight", "attn.q_proj.weight", (H, H)),
        ("attention.key.weight", "attn.k_proj.weight", (H, H)),
        ("attention.value.weight", "attn.v_proj.weight", (H, H)),
        ("attention.dense.weight", "attn.out_proj.weight", (H, H)),
        ("output.dense1.weight", "mlp.fc_in.weight", (I, H)),
        ("output.dense1.bias", "mlp.fc_in.bias", (I,)),
        ("output.dense2.weight", "mlp.fc_out.weight", (H, I)),
        ("output.dense2.bias", "mlp.fc_out.bias", (H,)),
    ],
    "gptneo": [
        ("attention.pre_layernorm.weight", "ln_1.weight", (H,)),
        ("attention.pre_layernorm.bias", "ln_1.bias", (H,)),
        ("attention.query.weight", "attn.attention.q_proj.weight", (H, H)),
        ("attention.key.weight", "attn.attention.k_proj.weight", (H, H)),
        ("attention.value.weight", "attn.attention.v_proj.weight", (H, H)),
        ("attention.dense.weight", "attn.attention.out_proj.weight", (H, H)),
        ("attention.dense.bias", "attn.attention.out_proj.bias", (H,)),
        ("output.pre_layernorm.weight", "ln_2.weight", (H,)),
        ("output.pre_layernorm.bias", "ln_2.bias", (H,)),
        ("output.dense1.weight", "mlp.c_fc.weight", (I, H)),
        ("output.dense1.bias", "mlp.c_fc.bias", (I,)),
        ("output.dense2.weight", "mlp.c_proj.weight", (H, I)),
        ("output.dense2.bias", "mlp.c_proj.bias", (H,)),
    ],
}
OUTSIDE = {
    "gptj": [
        ("word_embedding.weight", "transformer.wte.weight", (V, H)),
        ("layernorm.weight", "transformer.ln_f.weight", (H,)),
        ("layernorm.bias", "transformer.ln_f.bias", (H,)),
        ("lm_head.weight", "lm_head.weight", (V, H)),
        ("lm_head.bias", "lm_head.bias", (V,)),
    ],
    "gptneo": [
        ("word_embedding.weight", "transformer.wte.weight", (V, H)),
        ("position_embedding.weight", "transformer.wpe.weight", (P, H)),
        ("transformer.seq_layers.1.output.layernorm.weight", "transformer.ln_f.weight", (H,)),
        ("transformer.seq_layers.1.output.layernorm.bias", "transformer.ln_f.bias", (H,)),
        ("lm_head.weight", "lm_head.weight", (V, H)),
    ],
}
ROWS = [
    (family, *row)
    for family in LAYER
    for row in (
        *OUTSIDE[family],
        *(
            (f"transformer.seq_layers.{i}.{ours}", f"transformer.h.{i}.{theirs}", shape)
            for i in range(L)
            for ours, theirs, shape in LAYER[family]
        ),
    )
]
both = pytest.mark.parametrize("family", ["gptj", "gptneo"])


def functions(family: str):
    """To smdistributed's layout and back."""
    module = importlib.import_module(f"tensorpar.translators.{family}")
    there = getattr(module, f"translate_hf_state_dict_to_smdistributed_{family}")
    return there, getattr(module, f"translate_state_dict_to_hf_{family}")


def hf_dict(family: str, *without: str) -> dict[str, torch.Tensor]:
    """A causal language model's state dict, without some keys."""
    sizes = {"layers": L, "heads": 3, "head_size": 2, "inner": I, "vocab": V, "positions": P}
    hf = CASES[family].state_dict(CASES[family].config(**sizes))
    return {key: tensor for key, tensor in hf.items() if key not in without}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


@both
def test_keys_and_shapes(family):
    """Those of the table, and no others."""
    smd = functions(family)[0](hf_dict(family))
    shapes = {ours: shape for name, ours, _, shape in ROWS if name == family}
    assert {key: tuple(tensor.shape) for key, tensor in smd.items()} == shapes


@pytest.mark.parametrize(
    ("family", "ours", "theirs", "shape"), ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS]
)
def test_every_element(family, ours, theirs, shape):
    """The tensor under the other name; neither side is transposed."""
    hf = hf_dict(family)
    tensor, other = functions(family)[0](hf)[ours], hf[theirs]
    for index in torch.ones(shape).nonzero().tolist():
        assert tensor[tuple(index)] == other[tuple(index)]


@both
def test_there_and_back(family):
    """The identity."""
    there, back = functions(family)
    hf = hf_dict(family)
    assert_same(back(there(hf)), hf)


def test_the_word_embedding_of_gptneo_is_written_under_both_names():
    """Whether or not a file has the tied head."""
    there, _ = functions("gptneo")
    hf = hf_dict("gptneo")
    smd = there(hf_dict("gptneo", "lm_head.weight"))
    assert_same(smd, there(hf))
    assert torch.equal(smd["lm_head.weight"], smd["word_embedding.weight"])


def test_the_head_of_gptj_is_its_own():
    """It is not tied, and has a bias."""
    hf = hf_dict("gptj")
    smd = functions("gptj")[0](hf)
    assert not torch.equal(smd["lm_head.weight"], smd["word_embedding.weight"])
    assert torch.equal(smd["lm_head.bias"], hf["lm_head.bias"])


@both
def test_a_base_model_has_no_prefix_and_no_head(family):
    """Its keys lack `transformer.`; it comes back as it was, and gets no tied head."""
    there, back = functions(family)
    hf = hf_dict(family, "lm_head.weight", "lm_head.bias")
    base = {key.removeprefix("transformer."): tensor for key, tensor in hf.items()}
    smd = there(base)
    whole = there(hf_dict(family))
    assert_same(smd, {key: whole[key] for key in whole if not key.startswith("lm_head.")})
    assert_same(back(smd), base)
