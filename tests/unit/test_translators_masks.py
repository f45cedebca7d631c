"""The causal-mask buffers of old Transformers versions: dropped when read, added when asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensorpar.translators import from_hf, hf_to_smdistributed, to_hf
from tensorpar.translators.gpt2 import translate_state_dict_to_hf_gpt2
from tensorpar.translators.gptneo import translate_state_dict_to_hf_gptneo, window
from tensorpar.translators.masks import causal_mask
from tests.families import CASES, FAMILIES


@pytest.fixture(scope="module")
def gpt2():
    config = FAMILIES[0].config(add_cross_attention=True)
    return config, FAMILIES[0].state_dict(config)


def test_masks_by_hand():
    """Lower triangular; a window keeps the last columns of each row."""
    assert causal_mask(3).tolist() == [[[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    banded = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert causal_mask(4, window=2).tolist() == [[banded]]
    assert causal_mask(2).dtype == torch.uint8


@pytest.mark.parametrize("translate", [hf_to_smdistributed, from_hf])
def test_added_for_each_attention_with_max_seq_len(gpt2, translate):
    """Beside the tensors themselves, from either layout; none without."""
    config, hf = gpt2
    other = translate(hf, config)
    with_masks = translate_state_dict_to_hf_gpt2(other, 6)
    assert translate_state_dict_to_hf_gpt2(other).keys() == hf.keys()
    assert with_masks.keys() - hf.keys() == {
        f"transformer.h.{i}.{attention}.{name}"
        for i in range(2)
        for attention in ("attn", "crossattention")
        for name in ("bias", "masked_bias")
    }
    mask, bias = (with_masks[f"transformer.h.1.attn.{name}"] for name in ("bias", "masked_bias"))
    assert torch.equal(mask, torch.ones(6, 6, dtype=torch.uint8).tril()[None, None])
    assert (bias.shape, bias.dtype, bias.item()) == ((), torch.float32, -1e4)


def masks_of(case, changes, max_seq_len=5):
    """A model's state dict and what is added to it, from smdistributed's layout with the config."""
    config = case.config(**changes)
    hf = case.state_dict(config)
    added = to_hf(hf_to_smdistributed(hf, config), config, max_seq_len)
    assert added.keys() > hf.keys()
    return {key: tensor for key, tensor in added.items() if key not in hf}


def test_masks_of_gptj():
    """Lower triangular in every layer."""
    masks = masks_of(CASES["gptj"], {})
    whole = torch.ones(5, 5, dtype=torch.uint8).tril()[None, None]
    for i in range(2):
        assert torch.equal(masks.pop(f"transformer.h.{i}.attn.bias"), whole)
        assert masks.pop(f"transformer.h.{i}.attn.masked_bias").item() == -1e9
    assert not masks


@pytest.mark.parametrize(
    ("changes", "local"),
    [
        ({"layers": 3}, [False, True, False]),
        ({"attention_types": [[["local"], 1], [["global"], 1]]}, [True, False]),
    ],
)
def test_masks_of_gptneo_are_banded_in_local_layers(changes, local):
    """Which these are, and how wide, the config tells; a row keeps its last three columns."""
    masks = masks_of(CASES["gptneo"], changes)
    for i, is_local in enumerate(local):
        mask = masks.pop(f"transformer.h.{i}.attn.attention.bias")
        kept = [[r - c in range(3 if is_local else 5) for c in range(5)] for r in range(5)]
        assert (mask.dtype, mask[0, 0].tolist()) == (torch.uint8, kept)
        assert masks.pop(f"transformer.h.{i}.attn.attention.masked_bias").item() == -1e9
    assert not masks


def test_masks_of_gptneo_without_a_config():
    """As all published models: every second layer is local, of width 256."""
    config = CASES["gptneo"].config(layers=4)
    ours = from_hf(CASES["gptneo"].state_dict(config), config)
    made = translate_state_dict_to_hf_gptneo(ours, 258)
    for i in range(4):
        mask = made[f"transformer.h.{i}.attn.attention.bias"][0, 0]
        assert mask[255].tolist() == [1] * 256 + [0] * 2
        assert mask[257].tolist() == [0, 0] * (i % 2) + [1] * (258 - 2 * (i % 2))


def test_windows_of_gptneo_by_mappings():
    """The content of config.json, in either way of telling, in part, or of too few layers."""
    kinds = {"attention_types": [[["global", "local"], 2], [["local"], 1]], "window_size": 7}
    assert [window(i, kinds) for i in range(5)] == [None, 7, None, 7, 7]
    assert [window(i, {"attention_layers": ["local", "global"]}) for i in range(2)] == [256, None]
    assert [window(i, {"window_size": 7}) for i in range(3)] == [None, 7, None]
    with pytest.raises(ValueError, match=r"config.attention_layers = .'local'., required"):
        window(1, {"attention_layers": ["local"]})


@pytest.mark.parametrize("name", ["gptj", "gptneo"])
def test_dropped_for_other_families(name):
    """Masks of old files, in either direction."""
    config = CASES[name].config()
    hf = CASES[name].state_dict(config)
    old = to_hf(from_hf(hf, config), config, 6)
    for translate in (from_hf, hf_to_smdistributed):
        assert translate(old, config).keys() == translate(hf, config).keys()


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_none_for_encoders(name):
    """They never kept masks; the length is ignored."""
    config = CASES[name].config()
    hf = CASES[name].state_dict(config)
    assert to_hf(from_hf(hf, config), config, 6).keys() == hf.keys()


def test_dropped_on_purpose(gpt2):
    """Old files load like new ones, in every direction."""
    config, hf = gpt2
    old = to_hf(from_hf(hf, config), config, 6)
    for translate in (from_hf, hf_to_smdistributed):
        assert translate(old, config).keys() == translate(hf, config).keys()


def test_without_the_prefix(gpt2):
    """The buffers are where the other keys are."""
    config, hf = gpt2
    base = {k.removeprefix("transformer."): v for k, v in hf.items() if k != "lm_head.weight"}
    assert "h.0.attn.bias" in translate_state_dict_to_hf_gpt2(from_hf(base, config), 6)


def test_numpy_masks(gpt2):
    """NumPy in, NumPy out."""
    config, hf = gpt2
    arrays = {key: tensor.numpy() for key, tensor in hf.items()}
    masks = to_hf(from_hf(arrays, config), config, 4)
    assert isinstance(masks["transformer.h.0.attn.masked_bias"], np.ndarray)


@pytest.mark.parametrize("size", [0, -1, 2.5, "6"])
def test_a_wrong_length_is_refused(gpt2, size):
    """Before a mask of it is allocated."""
    config, hf = gpt2
    with pytest.raises(ValueError, match=r"max_seq_len = .*required: a positive integer"):
        to_hf(from_hf(hf, config), config, size)
