"""Layouts without a model: found by key, with sizes from the config."""

from __future__ import annotations

import numpy as np
import pytest

from tensorpar.translators import from_hf
from tensorpar.translators.layouts import Layouts, num_heads
from tests.families import FAMILIES


@pytest.fixture(scope="module")
def gpt2():
    """A config and a state dict."""
    config = FAMILIES[0].config()
    return config, FAMILIES[0].state_dict(config)


def test_configs_of_every_kind(gpt2):
    """Transformers' object, its dict, and the content of config.json."""
    config, hf = gpt2
    expected = from_hf(hf, config)
    for other in (config.to_dict(), {"model_type": "gpt2", "num_heads": 5}):
        made = from_hf(hf, other)
        assert all(np.array_equal(made[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "n_head": 5}, r"model_type = 'llama', required: one of"),
        ({"n_head": 5}, "model_type = None"),
        ({"model_type": "gpt2"}, "number of attention heads = None"),
        ({"model_type": "gpt2", "n_head": 7}, r"attn.c_attn.weight: shape = \(40, 120\)"),
    ],
)
def test_wrong_configs_are_refused(gpt2, config, message):
    """By what they lack; heads that do not divide, by every tensor concerned."""
    with pytest.raises(ValueError, match=message):
        from_hf(gpt2[1], config)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("transformer.h.0.attn.c_attn.weight", "i (b h d) -> b h d i"),
        ("h.11.attn.c_attn.bias", "(b h d) -> b h d"),
        ("decoder.h.3.crossattention.q_attn.weight", "i (h d) -> h d i"),
        ("transformer.h.0.attn.c_proj.weight", "(h d) o -> o h d"),
        ("transformer.h.0.mlp.c_proj.weight", "i o -> o i"),
        ("wte.weight", "v i -> v i"),
        ("lm_head.weight", "v i -> v i"),
        ("transformer.wpe.weight", None),
        ("transformer.h.0.ln_1.weight", None),
        ("transformer.h.0.attn.bias", None),
        ("score.weight", None),
    ],
)
def test_layouts_are_found_by_the_end_of_a_key(key, text):
    """Without a model; what no plan touches has none."""
    entry = Layouts("gpt2", 5).find(key)
    assert (entry and entry.layout.pattern.text) == text


@pytest.mark.parametrize(
    ("family", "key", "text"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.query.weight", "(h d) i -> h d i"),
        ("bert", "encoder.layer.0.crossattention.self.key.bias", "(h d) -> h d"),
        ("bert", "encoder.layer.1.attention.output.dense.weight", "o (h d) -> o h d"),
        ("bert", "encoder.layer.1.attention.output.dense.bias", "o -> o"),
        ("bert", "encoder.layer.1.crossattention.output.dense.weight", "o (h d) -> o h d"),
        ("bert", "encoder.layer.1.output.dense.weight", "o i -> o i"),
        ("bert", "encoder.layer.1.intermediate.dense.bias", "o -> o"),
        ("bert", "cls.predictions.bias", "v -> v"),
        ("bert", "cls.predictions.decoder.bias", "v -> v"),
        ("bert", "cls.predictions.transform.dense.weight", None),
        ("bert", "bert.pooler.dense.weight", None),
        ("bert", "bert.embeddings.position_embeddings.weight", None),
        ("roberta", "roberta.embeddings.word_embeddings.weight", "v i -> v i"),
        ("roberta", "lm_head.bias", "v -> v"),
        ("roberta", "lm_head.decoder.weight", "v i -> v i"),
        ("roberta", "lm_head.dense.weight", None),
        ("roberta", "classifier.dense.weight", None),
        ("gptj", "transformer.h.0.attn.out_proj.weight", "o (h d) -> o h d"),
        ("gptj", "h.0.attn.v_proj.weight", "(h d) i -> h d i"),
        ("gptj", "h.0.mlp.fc_out.bias", "o -> o"),
        ("gptj", "lm_head.bias", "v -> v"),
        ("gpt_neo", "transformer.h.0.attn.attention.q_proj.weight", "(h d) i -> h d i"),
        ("gpt_neo", "h.0.attn.attention.out_proj.bias", "o -> o"),
        ("gpt_neo", "h.0.mlp.c_proj.weight", "o i -> o i"),
        ("gpt_neo", "transformer.wpe.weight", None),
    ],
)
def test_layouts_of_other_families(family, key, text):
    """The same, where names of several modules are alike."""
    entry = Layouts(family, 5).find(key)
    assert (entry and entry.layout.pattern.text) == text


def test_fused_blocks_are_counted_where_the_module_is(gpt2):
    """Three in self-attention, two in cross-attention; heads from the config."""
    layouts = Layouts("gpt2", num_heads(gpt2[0]))
    for place, blocks in (("attn", 3), ("crossattention", 2)):
        assert layouts.find(f"h.0.{place}.c_attn.weight").sizes == {"b": blocks, "h": 5}
