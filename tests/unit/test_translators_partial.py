"""smdistributed's partial dicts, cut by hand: nothing here reads the product's table."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tensorpar.translators import hf_to_smdistributed, smdistributed_to_hf
from tensorpar.translators.gpt2 import (
    translate_hf_state_dict_to_smdistributed_gpt2,
    translate_state_dict_to_hf_gpt2,
)
from tests.families import FAMILIES, gpt2_config

P, H = 5, 6
every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def hf():
    """Three heads of size two."""
    return FAMILIES[0].state_dict(gpt2_config(heads=3, head_size=2, inner=7, positions=P))


@pytest.fixture(scope="module")
def smd(hf):
    return translate_hf_state_dict_to_smdistributed_gpt2(hf)


def partial(smd, t: int) -> list[dict[str, object]]:
    """What `t` tensor-parallel ranks hold of a full dict: the first ones hold one unit more.

    The head size is two.
    """
    ranks: list[dict[str, object]] = [{} for _ in range(t)]
    for key, tensor in smd.items():
        kind = re.sub(r".*seq_layers\.\d+\.(cross_)?", "", key)
        if kind in ("attention.dense.bias", "output.dense2.bias"):
            ranks[0][key] = tensor
            continue
        dim = 0 if "query" in kind or "key" in kind or "value" in kind or "dense1" in kind else None
        dim = 1 if kind in ("attention.dense.weight", "output.dense2.weight") else dim
        unit = 2 if "attention." in kind else 1
        for rank in range(t):
            if dim is None:
                ranks[rank][key] = tensor
            else:
                held = np.array_split(np.arange(tensor.shape[dim] // unit), t)[rank]
                index = torch.tensor([h * unit + d for h in held for d in range(unit)]).long()
                ranks[rank][key] = tensor.index_select(dim, index)
    for part in ranks:
        part |= {"_smp_is_partial": True, "_smp_load_info": (None, "anything")}
    return ranks


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_partial_dicts_of_all_ranks(hf, smd, t):
    """Slices by heads, uneven, even none; row-parallel biases from the first rank alone."""
    merged = translate_state_dict_to_hf_gpt2(partial(smd, t))
    assert merged.keys() == hf.keys()
    assert all(torch.equal(merged[key], hf[key]) for key in hf)


@every_family
@pytest.mark.parametrize("t", [2, 3, 4])
def test_partial_dicts_of_every_family(case, t):
    """By the family-free function, with cross-attention where the family has it."""
    config = case.config(heads=3, head_size=2, inner=7, **case.variants[-1])
    hf = case.state_dict(config)
    merged = smdistributed_to_hf(partial(hf_to_smdistributed(hf, config), t), config)
    assert merged.keys() == hf.keys()
    assert all(torch.equal(merged[key], hf[key]) for key in hf)


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda ranks: ranks[::-1], "dense.bias: held by ranks"),
        (
            lambda ranks: [
                {**one, **{key: other[key] for key in one if "value.bias" in key}}
                for one, other in (ranks, ranks[::-1])
            ],
            "value.bias: shapes",
        ),
        (lambda ranks: ranks[:1], "query.weight has shape"),
        (lambda ranks: [ranks[1], *ranks[1:]], "transformer.seq_layers.0.attention.dense.bias is"),
        (
            lambda ranks: [*ranks[:1], {**ranks[1], "position_embedding.weight": torch.ones(P, H)}],
            "1 problem: position_embedding.weight: ranks .1. differ",
        ),
        (
            lambda ranks: [*ranks[:1], {k: v for k, v in ranks[1].items() if "wor" not in k}],
            "1 problem: word_embedding.weight: held by ranks .0., required: by ranks .0, 1.",
        ),
        (
            lambda ranks: [
                {k: v.half() if "key.b" in k else v for k, v in ranks[0].items()},
                ranks[1],
            ],
            "key.bias: shapes",
        ),
    ],
    ids=["order", "uneven order", "part", "twice", "replica", "absent", "dtype"],
)
def test_what_is_not_all_ranks_of_one_model_is_refused(smd, breaking, message):
    """Nothing is guessed."""
    with pytest.raises(ValueError, match=message):
        translate_state_dict_to_hf_gpt2(breaking(partial(smd, 2)))
