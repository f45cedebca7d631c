"""BERT and RoBERTa in smdistributed's layout: keys and shapes typed from its table, values by hand.

Nothing here reads the product's table: H = 6, N = 3, I = 7, V = 11, P = 5, L = 2.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.families import CASES, CROSS

H, I, V, P, L = 6, 7, 11, 5, 2  # noqa: E741  (the symbols of the format)

# smdistributed's key in a layer, Hugging Face's, and the shape of both
SELF = [
    ("attention.query.weight", "attention.self.query.weight", (H, H)),
    ("attention.query.bias", "attention.self.query.bias", (H,)),
    ("attention.key.weight", "attention.self.key.weight", (H, H)),
    ("attention.key.bias", "attention.self.key.bias", (H,)),
    ("attention.value.weight", "attention.self.value.weight", (H, H)),
    ("attention.value.bias", "attention.self.value.bias", (H,)),
    ("attention.dense.weight", "attention.output.dense.weight", (H, H)),
    ("attention.dense.bias", "attention.output.dense.bias", (H,)),
    ("attention.layernorm.weight", "attention.output.LayerNorm.weight", (H,)),
    ("attention.layernorm.bias", "attention.output.LayerNorm.bias", (H,)),
]
CROSS_ATTENTION = [
    ("cross_attention.query.weight", "crossattention.self.query.weight", (H, H)),
    ("cross_attention.query.bias", "crossattention.self.query.bias", (H,)),
    ("cross_attention.key.weight", "crossattention.self.key.weight", (H, H)),
    ("cross_attention.key.bias", "crossattention.self.key.bias", (H,)),
    ("cross_attention.value.weight", "crossattention.self.value.weight", (H, H)),
    ("cross_attention.value.bias", "crossattention.self.value.bias", (H,)),
    ("cross_attention.dense.weight", "crossattention.output.dense.weight", (H, H)),
    ("cross_attention.dense.bias", "crossattention.output.dense.bias", (H,)),
    ("cross_attention.layernorm.weight", "crossattention.output.LayerNorm.weight", (H,)),
    ("cross_attention.layernorm.bias", "crossattention.output.LayerNorm.bias", (H,)),
]
OUTPUT = [
    ("output.dense1.weight", "intermediate.dense.weight", (I, H)),
    ("output.dense1.bias", "intermediate.dense.bias", (I,)),
    ("output.dense2.weight", "output.dense.weight", (H, I)),
    ("output.dense2.bias", "output.dense.bias", (H,)),
    ("output.layernorm.weight", "output.LayerNorm.weight", (H,)),
    ("output.layernorm.bias", "output.LayerNorm.bias", (H,)),
]
LAYER = SELF + CROSS_ATTENTION + OUTPUT
EMBEDDINGS = {
    "embeddings.word_embeddings.weight": (V, H),
    "embeddings.position_embeddings.weight": (P, H),
    "embeddings.token_type_embeddings.weight": (2, H),
    "embeddings.LayerNorm.weight": (H,),
    "embeddings.LayerNorm.bias": (H,),
}
HEADS = {
    "bert": {
        "bert.pooler.dense.weight": (H, H),
        "bert.pooler.dense.bias": (H,),
        "cls.predictions.bias": (V,),
        "cls.predictions.transform.dense.weight": (H, H),
        "cls.predictions.transform.dense.bias": (H,),
        "cls.predictions.transform.LayerNorm.weight": (H,),
        "cls.predictions.transform.LayerNorm.bias": (H,),
        "cls.predictions.decoder.weight": (V, H),
        "cls.predictions.decoder.bias": (V,),
        "cls.seq_relationship.weight": (2, H),
        "cls.seq_relationship.bias": (2,),
    },
    "roberta": {
        "lm_head.bias": (V,),
        "lm_head.dense.weight": (H, H),
        "lm_head.dense.bias": (H,),
        "lm_head.layer_norm.weight": (H,),
        "lm_head.layer_norm.bias": (H,),
        "lm_head.decoder.weight": (V, H),
        "lm_head.decoder.bias": (V,),
    },
}
MODELS = {"bert": "BertForPreTraining", "roberta": "RobertaForMaskedLM"}
both = pytest.mark.parametrize("family", ["bert", "roberta"])


def functions(family: str):
    """To smdistributed's layout and back."""
    module = importlib.import_module(f"tensorpar.translators.{family}")
    there = getattr(module, f"translate_hf_state_dict_to_smdistributed_{family}")
    return there, getattr(module, f"translate_state_dict_to_hf_{family}")


def hf_dict(family: str, **changes) -> dict[str, torch.Tensor]:
    sizes = {"layers": L, "heads": 3, "head_size": 2, "inner": I, "vocab": V, "positions": P}
    config = CASES[family].config(**sizes, **changes)
    return CASES[family].state_dict(config, model=MODELS[family])


def expected(family: str, layer) -> dict[str, tuple[int, ...]]:
    shapes = {f"{family}.{key}": shape for key, shape in EMBEDDINGS.items()} | HEADS[family]
    for i in range(L):
        shapes |= {f"{family}.encoder.seq_layers.{i}.{key}": shape for key, _, shape in layer}
    return shapes


@both
@pytest.mark.parametrize(("changes", "layer"), [({}, SELF + OUTPUT), (CROSS, LAYER)])
def test_keys_and_shapes(family, changes, layer):
    """Those of the table, and no others; cross-attention beside the layer's own keys."""
    smd = functions(family)[0](hf_dict(family, **changes))
    assert {key: tuple(tensor.shape) for key, tensor in smd.items()} == expected(family, layer)


@both
@pytest.mark.parametrize(("ours", "theirs", "shape"), LAYER, ids=[key for key, *_ in LAYER])
def test_every_element_of_a_layer(family, ours, theirs, shape):
    """The tensor under the other name, in each layer; neither side is transposed."""
    hf = hf_dict(family, **CROSS)
    smd = functions(family)[0](hf)
    for i in range(L):
        tensor = smd[f"{family}.encoder.seq_layers.{i}.{ours}"]
        other = hf[f"{family}.encoder.layer.{i}.{theirs}"]
        for index in torch.ones(shape).nonzero().tolist():
            assert tensor[tuple(index)] == other[tuple(index)]


@both
def test_everything_else_is_unchanged(family):
    """Embeddings, pooler and heads, under their own names."""
    hf = hf_dict(family)
    smd = functions(family)[0](hf)
    for key in (*HEADS[family], *(f"{family}.{key}" for key in EMBEDDINGS)):
        assert torch.equal(smd[key], hf[key])


@both
@pytest.mark.parametrize("changes", [{}, CROSS])
@pytest.mark.parametrize("prefix", [True, False])
def test_there_and_back(family, changes, prefix):
    """The identity, also without the prefix, as the base models save it."""
    hf = hf_dict(family, **changes)
    if not prefix:
        own = {key: tensor for key, tensor in hf.items() if key.startswith(f"{family}.")}
        hf = {key.removeprefix(f"{family}."): tensor for key, tensor in own.items()}
    there, back = functions(family)
    smd = there(hf)
    assert ("encoder.seq_layers.1.output.dense1.bias" in smd) is not prefix
    returned = back(smd)
    assert returned.keys() == hf.keys()
    assert all(torch.equal(returned[key], hf[key]) for key in hf)
