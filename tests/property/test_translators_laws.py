"""The laws of translation, over families, random tiny configs and world sizes; no process group.

Values are compared bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorpar.partition import shard, unshard
from tensorpar.registry import plans
from tensorpar.styles import Layout
from tensorpar.translators import (
    from_hf,
    hf_to_smdistributed,
    merge,
    reshard,
    smdistributed_to_hf,
    split,
    to_hf,
)
from tensorpar.translators.tensors import bit_identical
from tests.families import FAMILIES, FamilyCase
from tests.strategies import axis_sizes, dtypes, tiny_configs, world_sizes

every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


def assert_same(left, right):
    """Same keys, and every tensor of the same shape, dtype and values."""
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        other = right[key]
        assert (key, tensor.shape, tensor.dtype) == (key, other.shape, other.dtype)
        assert bit_identical(tensor, other), key


def rows() -> list[Layout]:
    """Every layout of every registered style, once."""
    found = {
        layout
        for plan in plans("transformers.")
        for style in plan.children.values()
        for layout in style.layouts.values()
    }
    return sorted(found, key=lambda layout: layout.pattern.text)


def numbered(shape) -> torch.Tensor:
    """A tensor all of whose elements differ."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.data(), world_sizes())
def test_law_partition(shape, data, n):
    """unshard(shard(x, n)) == x"""
    dim = data.draw(st.integers(0, len(shape) - 1))
    full = numbered(shape)
    shards = shard(full, dim, n)
    assert len(shards) == n
    assert torch.equal(unshard(shards, dim), full)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.pattern.text)
@given(st.data())
def test_law_layout(row: Layout, data):
    """p⁻¹(p(x)) == x and p(p⁻¹(y)) == y"""
    sizes = data.draw(axis_sizes([axis.strip("()") for axis in row.pattern.right_axes]))
    ours = numbered(list(sizes.values()))
    theirs = row.pattern.inverse.apply(ours)
    assert torch.equal(row.pattern.apply(theirs, **sizes), ours)
    assert torch.equal(row.pattern.inverse.apply(row.pattern.apply(theirs, **sizes)), theirs)


@every_family
@given(st.data(), world_sizes(), dtypes)
def test_law_commute(case: FamilyCase, data, n, dtype):
    """to_hf(merge(split(from_hf(s), n))) == s"""
    config = data.draw(tiny_configs(case))
    s = case.state_dict(config, dtype)
    shards = split(from_hf(s, config), config, n)
    assert_same(to_hf(merge(shards, config), config), s)
    assert_same(to_hf(shards, config), s)


@every_family
@given(st.data(), world_sizes(), world_sizes(), dtypes)
def test_law_reshard(case: FamilyCase, data, a, b, dtype):
    """split(merge(split(x, a)), b) == split(x, b)"""
    config = data.draw(tiny_configs(case))
    x = from_hf(case.state_dict(config, dtype), config)
    for left, right in zip(
        reshard(split(x, config, a), config, b), split(x, config, b), strict=True
    ):
        assert_same(left, right)


@every_family
@given(st.data(), dtypes)
def test_law_smdistributed(case: FamilyCase, data, dtype):
    """hf -> smdistributed -> hf is the identity"""
    config = data.draw(tiny_configs(case))
    s = case.state_dict(config, dtype)
    assert_same(smdistributed_to_hf(hf_to_smdistributed(s, config), config), s)


@every_family
@given(st.data(), world_sizes())
def test_law_refusal_of_shards(case: FamilyCase, data, n):
    """A key that one rank lacks, and a replicated parameter that differs, are named."""
    config = data.draw(tiny_configs(case))
    shards = split(from_hf(case.state_dict(config), config), config, n + 1)
    key = data.draw(st.sampled_from(sorted(shards[0])))
    rank = data.draw(st.integers(0, n))
    lacking = [
        {k: v for k, v in part.items() if (k, i) != (key, rank)} for i, part in enumerate(shards)
    ]
    with pytest.raises(ValueError, match=rf"1 problem: {key} is absent on ranks \[{rank}\]"):
        merge(lacking, config)
    norm = data.draw(st.sampled_from([k for k in shards[0] if "ln_" in k or "norm" in k.lower()]))
    shards[n] = {**shards[n], norm: shards[n][norm] + 1}
    with pytest.raises(ValueError, match=rf"1 problem: {norm}: ranks \[{n}\] differ from rank 0"):
        merge(shards, config)


@every_family
@given(st.data())
def test_law_refusal_of_keys(case: FamilyCase, data):
    """A key dropped, added or renamed in the trunk raises, in both directions, and is named."""
    config = data.draw(tiny_configs(case))
    hf = case.state_dict(config)
    for s, translate in (
        (hf, hf_to_smdistributed),
        (hf_to_smdistributed(hf, config), smdistributed_to_hf),
    ):
        heads = ("lm_head", *case.free)
        key = data.draw(st.sampled_from(sorted(k for k in s if not k.startswith(heads))))
        dropped = {k: v for k, v in s.items() if k != key}
        renamed = {(f"{k}_" if k == key else k): v for k, v in s.items()}
        for broken in (dropped, renamed, {**s, f"{key}_": s[key]}):
            with pytest.raises(ValueError, match="problem") as error:
                translate(broken, config)
            assert key in str(error.value) or "no key belongs to a layer" in str(error.value)


@every_family
@given(st.data())
def test_law_refusal_of_shapes(case: FamilyCase, data):
    """A tensor with one dim more raises in every direction, and is named with its shape."""
    config = data.draw(tiny_configs(case))
    hf = case.state_dict(config)
    ours, smd = from_hf(hf, config), hf_to_smdistributed(hf, config)
    touched = sorted(k for k in hf if ours[k].shape != hf[k].shape or "wte" in k or "word" in k)
    held = [sorted(k for k in s if not k.startswith(case.free)) for s in (hf, smd)]
    for s, keys, translate in (
        (hf, touched, from_hf),
        (ours, touched, to_hf),
        (ours, touched, lambda s, config: split(s, config, 2)),
        (hf, held[0], hf_to_smdistributed),
        (smd, held[1], smdistributed_to_hf),
    ):
        key = data.draw(st.sampled_from(keys))
        wrong = s[key].unsqueeze(0)
        with pytest.raises(ValueError, match="problem") as error:
            translate({**s, key: wrong}, config)
        assert key in str(error.value)
        assert str(tuple(wrong.shape)) in str(error.value)
