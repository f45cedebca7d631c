"""The likeliest token of a sharded vocabulary against `torch.argmax` of all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorpar
from tensorpar.nn.greedy import ShardedLogits, likeliest
from tensorpar.parameters import local_shard
from tests.collectives import Collectives
from tests.pool import Pool

#: few, so that rows have several largest, and all that has an order of its own.
VALUES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan, -math.nan]


def chosen(rows: list[list[float]], dtype: torch.dtype) -> tuple[list[int], list[int]]:
    """The likeliest tokens of rows of logits, and torch's."""
    logits = torch.tensor(rows).to(dtype)
    mesh = tensorpar.tp_mesh()
    ours = likeliest(local_shard(logits, mesh, 1), logits.shape[1], mesh)
    return ours.tolist(), logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
def test_the_likeliest_is_torchs(ranks: Pool, size: int, dtype: torch.dtype, data: Any) -> None:
    """The first of equals, NaN before all; of vocabularies that do not divide, or are too small."""
    num_tokens = data.draw(st.integers(1, 9))
    value = st.sampled_from(VALUES) | st.floats(width=32)
    row = st.lists(value, min_size=num_tokens, max_size=num_tokens)
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    for ours, reference in ranks(size).run(chosen, rows, dtype):
        assert ours == reference


#: what may be asked of logits `[2, 3, 7]`, and whether they are gathered for it.
QUESTIONS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "as generate does": (
        lambda x: torch.argmax(x[:, -1].to(copy=True, dtype=torch.float32), -1),
        False,
    ),
    "rows": (lambda x: x[:, -1, :].argmax(dim=-1), False),
    "narrower": (lambda x: x.to(torch.bfloat16).argmax(2), False),
    "one token's": (lambda x: x[..., 3], True),
    "some tokens'": (lambda x: x[:, :, 2:5], True),
    "a mask": (lambda x: x[torch.tensor([True, False])], True),
    "of all": (lambda x: x.argmax(), True),
    "along rows": (lambda x: x.argmax(1), True),
    "kept dim": (lambda x: x.argmax(-1, keepdim=True), True),
    "wider": (lambda x: x.to(torch.float64).argmax(-1), True),
    "by name": (lambda x: torch.argmax(input=x, dim=-1), True),
    "probabilities": (lambda x: torch.softmax(x[:, -1], -1), True),
    "a sum": (lambda x: 2 * x + x, True),
    "together": (lambda x: torch.cat([x, x[:, :1]], 1), True),
    "shape": (lambda x: torch.tensor(x.shape), True),
    "words": (lambda x: torch.tensor(list(repr(x).encode())), True),
}


def answers(question: str) -> tuple[torch.Tensor, torch.Tensor, bool, bool]:
    """Of sharded and of whole logits; whether any were gathered, and whether the first is plain."""
    ask, _ = QUESTIONS[question]
    whole = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(3))
    mesh = tensorpar.tp_mesh()
    logits = ShardedLogits.of(local_shard(whole, mesh, 2), 7, mesh)
    with torch.no_grad(), Collectives() as seen:
        ours = ask(logits)
    return ours, ask(whole), seen.counts["allgather_"] > 0, type(ours) is torch.Tensor


@pytest.mark.parametrize("question", QUESTIONS)
def test_sharded_logits_answer_as_whole_ones(ranks, question):
    """Bit for bit; gathered only where it must be."""
    for ours, reference, gathered, plain in ranks(2).run(answers, question):
        assert torch.equal(ours, reference)
        assert gathered == QUESTIONS[question][1]
        assert plain
