"""The causal-mask buffers of old Transformers versions: dropped when read, added when asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensorpar.translators import from_hf, hf_to_smdistributed, to_hf
from tensorpar.translators.gpt2 import translate_state_dict_to_hf_gpt2
from tensorpar.translators.masks import causal_mask
from tests.families import FAMILIES


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
