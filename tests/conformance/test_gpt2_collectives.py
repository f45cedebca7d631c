"""The communication formula, counted: two all-reduces a layer each way, and what is not a layer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers

import tensorpar
from tests.collectives import Collectives
from tests.conformance.gpt2 import Case, batch, checkpoint_activations, config

LAYERS = 2
BATCH_CHECK, EMBEDDING, LOSS, HEAD_BACKWARD = 1, 1, 2, 1

Counts = dict[str, int]


def counted(case: Case, train: bool, check_batches: bool) -> tuple[Counts, Counts]:
    """Collectives of a forward, and of its backward."""
    torch.manual_seed(0)
    with tensorpar.tensor_parallelism(check_batches=check_batches):
        model = getattr(transformers, case.head)(config(case))
    if case.checkpointing:
        checkpoint_activations(model)
    model.train(train)
    with Collectives() as seen, nullcontext() if train else torch.no_grad():
        output = model(**batch(case))
        forward = seen.counts.copy()
        if train:
            loss = output.loss if case.labels else output[0].sum()
            loss.backward()
    return dict(forward), dict(seen.counts - forward)


def _require(results: list[Any], forward: Counts, backward: Counts) -> None:
    assert results == [(forward, backward)] * len(results)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_training_with_labels(ranks, implementation, size):
    """A training step gathers nothing: 2 all-reduces a layer each way, embedding, loss, head."""
    case = Case(config={"attn_implementation": implementation})
    _require(
        ranks(size).run(counted, case, True, True),
        {"allreduce_": BATCH_CHECK + EMBEDDING + 2 * LAYERS + LOSS},
        {"allreduce_": 2 * LAYERS + HEAD_BACKWARD},
    )


def test_the_batch_check_is_a_line_of_its_own(ranks):
    """`check_batches=False` saves exactly one all-reduce a forward."""
    _require(
        ranks(2).run(counted, Case(), True, False),
        {"allreduce_": EMBEDDING + 2 * LAYERS + LOSS},
        {"allreduce_": 2 * LAYERS + HEAD_BACKWARD},
    )


def test_checkpointing_pays_the_forward_again(ranks):
    """Recomputing the blocks costs their forward's all-reduces once more, or fewer."""
    case = Case(checkpointing=True)
    for forward, backward in ranks(2).run(counted, case, True, False):
        assert forward == {"allreduce_": EMBEDDING + 2 * LAYERS + LOSS}
        assert 2 * LAYERS < backward["allreduce_"] - HEAD_BACKWARD <= 4 * LAYERS


def test_without_labels_the_logits_are_gathered_once(ranks):
    """A forward without labels gathers logits once and reduces twice a layer."""
    _require(
        ranks(2).run(counted, Case(labels=False), True, True),
        {"allreduce_": BATCH_CHECK + EMBEDDING + 2 * LAYERS, "allgather_": 1},
        {"allreduce_": 2 * LAYERS + HEAD_BACKWARD},
    )


def test_evaluating_with_labels(ranks):
    """In eval the loss is computed on the shards and the logits are gathered once."""
    for forward, backward in ranks(2).run(counted, Case(), False, True):
        gathers = sum(count for name, count in forward.items() if "gather" in name)
        assert gathers == 1
        assert forward["allreduce_"] == BATCH_CHECK + EMBEDDING + 2 * LAYERS + LOSS
        assert backward == {}


def test_seeing_attentions_costs_one_gather_a_layer(ranks):
    """Recorded attentions are gathered at the end of the base model, never inside a layer."""
    case = Case(
        "GPT2Model", {"attn_implementation": "eager"}, {"output_attentions": True}, labels=False
    )
    _require(
        ranks(2).run(counted, case, True, True),
        {"allreduce_": BATCH_CHECK + EMBEDDING + 2 * LAYERS, "allgather_": LAYERS},
        {"allreduce_": 2 * LAYERS},
    )


@pytest.mark.parametrize("labels", [False, True])
def test_one_process_communicates_nothing(ranks, labels):
    """Alone, the same script makes no collective call at all."""
    _require(ranks(1).run(counted, Case(labels=labels), True, True), {}, {})
