"""The communication formula of every family, counted: layers, embedding, head, loss, tokens."""

from __future__ import annotations

import pytest
import torch

from tests.collectives import Collectives
from tests.conformance.families import CASES, CAUSAL, build, build_causal, inputs

LAYERS = 2
EMBEDDING, LOSS, HEAD_BACKWARD, BATCH_CHECK = 1, 2, 1, 1
#: GPT-J sums its attention and its MLP at once.
PER_LAYER = dict.fromkeys(CASES, 2) | {"gptj": 1}
MASKED = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}

Counts = dict[str, int]


def counted(family: str, head: str, labels: bool, check_batches: bool) -> tuple[Counts, Counts]:
    """Collectives of a training forward, and of its backward."""
    model = build(family, head, parallel=True, check_batches=check_batches).train()
    with Collectives() as seen:
        output = model(**inputs(head, labels=labels))
        forward = seen.counts.copy()
        (output.loss if labels else output[0].sum()).backward()
    return dict(forward), dict(seen.counts - forward)


@pytest.mark.feature("collectives counted: layers, embedding, head, loss")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(CASES))
def test_collectives_of_a_step(ranks, family, size):
    """Two all-reduces a layer each way, one for GPT-J; with labels nothing is ever gathered."""
    layers = PER_LAYER[family] * LAYERS
    for head in (CAUSAL[family], MASKED.get(family)):
        if head is None:
            continue
        results = ranks(size).run(counted, family, head, True, True)
        forward = {"allreduce_": BATCH_CHECK + EMBEDDING + layers + LOSS}
        assert results == [(forward, {"allreduce_": layers + HEAD_BACKWARD})] * size
    base = CASES[family].heads[0]
    results = ranks(size).run(counted, family, base, False, False)
    assert results == [({"allreduce_": EMBEDDING + layers}, {"allreduce_": layers})] * size


def counted_generation(family: str, do_sample: bool) -> tuple[Counts, Counts]:
    """Collectives of generating two tokens, and of each token beyond them."""
    model = build_causal(family, parallel=True).eval()
    model.generation_config.eos_token_id = None
    found = []
    for tokens in (2, 5):
        with Collectives() as seen:
            model.generate(torch.arange(2, 8)[None], max_new_tokens=tokens, do_sample=do_sample)
        found.append(seen.counts)
    two, five = found
    more = five - two
    assert all(number % 3 == 0 for number in more.values())
    return dict(two), {name: number // 3 for name, number in more.items()}


@pytest.mark.feature("collectives of a generated token counted")
@pytest.mark.parametrize("family", sorted(CASES))
def test_collectives_of_a_token(ranks, family):
    """A token costs the layers, the embedding, and one gather of the last position's logits."""
    layers = PER_LAYER[family] * LAYERS
    token = {"allreduce_": EMBEDDING + layers, "allgather_": 1}
    for two, each in ranks(2).run(counted_generation, family, True):
        assert each == token
        assert two["allreduce_"] == BATCH_CHECK + 2 * token["allreduce_"]
        assert two["allgather_"] == 2


@pytest.mark.feature("greedy decoding gathers no logits")
@pytest.mark.parametrize("family", sorted(CASES))
def test_collectives_of_the_likeliest_token(ranks, family):
    """To choose the likeliest token costs one all-reduce; nothing is gathered."""
    token = EMBEDDING + PER_LAYER[family] * LAYERS + 1
    for two, each in ranks(2).run(counted_generation, family, False):
        assert each == {"allreduce_": token}
        # and one to learn that on no rank anybody sees the logits
        assert two["allreduce_"] == BATCH_CHECK + 1 + 2 * token
        assert "allgather_" not in two
