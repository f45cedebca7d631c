"""Fields of the configs that change what a model computes, or which parameters it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    CAUSAL,
    EXACT,
    IN_FLOAT32,
    build,
    build_causal,
    compared,
    inputs,
)
from tests.conformance.gpt2 import Tensors, require_close, require_equal_ranks, scale_of

ENCODER: dict[str, list[dict[str, Any]]] = {
    "hidden_act": [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}],
    "chunk_size_feed_forward": [{"chunk_size_feed_forward": 3}],
    "type_vocab_size": [{"type_vocab_size": 3}],
}
#: family, then feature, to changes of the config that prove it together.
VARIANTS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "gpt2": {
        "scale_attn_by_inverse_layer_idx": [{"scale_attn_by_inverse_layer_idx": True}],
        "scale_attn_weights": [{"scale_attn_weights": False}],
        "n_inner": [{"n_inner": None}, {"n_inner": 7}],
        "activation_function": [{"activation_function": "relu"}],
    },
    "bert": ENCODER,
    "roberta": ENCODER,
    "gptj": {
        "rotary_dim": [{"rotary_dim": 8}, {"rotary_dim": 2}],
        "n_inner": [{"n_inner": None}],
        "activation_function": [{"activation_function": "relu"}],
    },
    "gptneo": {
        "attention_types": [
            {"attention_types": [[["global"], 2]]},
            {"attention_types": [[["local"], 2]]},
            {"attention_types": [[["local", "global"], 1], [["local"], 1]], "layers": 3},
        ],
        "window_size": [{"window_size": 1}, {"window_size": 5}, {"window_size": 40}],
        "intermediate_size": [{"intermediate_size": None}],
        "activation_function": [{"activation_function": "relu"}],
    },
    "gptneox": {
        "use_parallel_residual": [
            {"use_parallel_residual": False},
            {"use_parallel_residual": True},
        ],
        "attention_bias": [{"attention_bias": False}],
        "hidden_act": [{"hidden_act": "relu"}],
        "partial_rotary_factor": [
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 99.0,
                    "partial_rotary_factor": x,
                }
            }
            for x in (0.5, 1.0)
        ],
    },
}
PAIRS = [
    pytest.param(feature, family, marks=pytest.mark.feature(f"config: {feature}"))
    for family, features in VARIANTS.items()
    for feature in features
]


def computed(family: str, changes: list[Mapping[str, Any]], parallel: bool, fused: bool) -> Tensors:
    """Outputs and gradients under each of the configs, unpadded."""
    found: Tensors = {}
    for number, config in enumerate(changes):
        head = CASES[family].model
        model = build(family, head, parallel=parallel, config=config, fused_attention=fused)
        given: dict[str, Any] = {"input_ids": inputs("", labels=False)["input_ids"]}
        if "type_vocab_size" in config:
            given["token_type_ids"] = given["input_ids"] % config["type_vocab_size"]
        seen = compared(model, {**given, "output_hidden_states": True})
        found |= {f"{number}/{name}": x for name, x in seen.items()}
    return found


@pytest.mark.parametrize(("feature", "family"), PAIRS)
def test_config(ranks, family, feature):
    """Outputs, hidden states and gradients equal one process's under every value."""
    changes = VARIANTS[family][feature]
    results = ranks(2).run(computed, family, changes, True, False)
    require_equal_ranks(results)
    require_close(results[0], computed(family, changes, False, False), EXACT)


@pytest.mark.parametrize("feature", ["attention_types", "window_size"])
def test_windows_of_fused_attention(ranks, feature):
    """GPT-Neo's local windows are those of Transformers where attention is fused, too."""
    changes = VARIANTS["gptneo"][feature]
    results = ranks(2).run(computed, "gptneo", changes, True, True)
    reference = computed("gptneo", changes, False, False)
    require_close(results[0], reference, BEHIND_FLOAT32 * scale_of(reference))


def rotated_and_fused(parallel: bool) -> Tensors:
    """GPT-J with its rotations, attention fused."""
    return computed("gptj", VARIANTS["gptj"]["rotary_dim"], parallel, True)


def test_rotations_of_fused_attention(ranks):
    """GPT-J's rotations do not depend on how attention is computed."""
    results = ranks(2).run(rotated_and_fused, True)
    reference = rotated_and_fused(False)
    require_close(results[0], reference, BEHIND_FLOAT32 * scale_of(reference))


def tied_otherwise(family: str, parallel: bool) -> Tensors:
    """Outputs and gradients of the language models whose heads are tied as they usually are not."""
    found: Tensors = {}
    for head in dict.fromkeys((CASES[family].model, CAUSAL[family])):
        tied = family == "gptneox"
        config = {"tie_word_embeddings": tied}
        model = build(family, head, parallel=parallel, config=config, fused_attention=False)
        inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
        assert (inside.weight is outside.weight) == tied
        given = inputs(head, labels=False)
        seen = compared(model, given, given["attention_mask"])
        found |= {f"{head}/{name}": x for name, x in seen.items()}
    return found


@pytest.mark.feature("config: tie_word_embeddings")
@pytest.mark.parametrize("family", sorted(CASES))
def test_ties(ranks, family):
    """Untied heads, and GPT-NeoX's tied one, their gradients included."""
    results = ranks(4).run(tied_otherwise, family, True)
    require_equal_ranks(results)
    require_close(results[0], tied_otherwise(family, False), EXACT)


def upcast(parallel: bool) -> Tensors:
    """GPT-2's reordered and upcast attention, which runs in half precision or float32 only."""
    config = {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}
    model = build_causal("gpt2", parallel=parallel, config=config, dtype=torch.float32)
    return compared(model, {"input_ids": inputs("", labels=False)["input_ids"]})


@pytest.mark.feature("config: reorder_and_upcast_attn")
@pytest.mark.parametrize("family", ["gpt2"])
def test_upcast_attention(ranks, family):
    """In float32."""
    assert family not in IN_FLOAT32
    results = ranks(2).run(upcast, True)
    reference = upcast(False)
    require_close(results[0], reference, 1e-5 * scale_of(reference))
