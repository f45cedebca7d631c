"""`resize_token_embeddings`: the vocabulary grows and shrinks to sizes that divide by nothing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard

from tensorpar import empty_shards
from tests.conformance.families import BEHIND_FLOAT32, CASES, build
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)

FEATURE = pytest.mark.feature("resize_token_embeddings")
#: arguments of the successive calls, and the vocabularies they give.
CALLS = (
    ({"new_num_tokens": 101}, 101),
    ({"pad_to_multiple_of": 8}, 104),
    ({"new_num_tokens": 60}, 60),
    ({"new_num_tokens": 63, "mean_resizing": False}, 63),
    ({"new_num_tokens": 61, "pad_to_multiple_of": 7}, 63),
)


def trained(model: Any, vocabulary: int) -> Tensors:
    """Losses of two clipped steps of an optimizer that was built just now."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocabulary, (3, 9), generator=generator)
    losses = []
    for _ in range(2):
        loss = model.train()(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    assert logits.shape[-1] == vocabulary
    return {"losses": torch.stack(losses), "logits": logits.double()}


def require_sharded(model: Any, vocabulary: int, *, parallel: bool) -> None:
    """The counts are global, and what belongs to the vocabulary is cut by it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert model.config.vocab_size == embedding.num_embeddings == head.out_features == vocabulary
    for parameter in (embedding.weight, head.weight, head.bias):
        if parameter is not None:
            assert parameter.shape[0] == vocabulary
            assert isinstance(parameter, DTensor) == parallel
            assert not parallel or parameter.placements == (Shard(0),)
    assert (embedding.weight is head.weight) == model.config.tie_word_embeddings


def resized(family: str, tied: bool, parallel: bool) -> Tensors:
    """All weights after each call, losses in between, and what is saved in the end."""
    model = build(
        family, CASES[family].model, parallel=parallel, config={"tie_word_embeddings": tied}
    )
    found: Tensors = {}
    torch.manual_seed(4)
    for step, (call, vocabulary) in enumerate(CALLS):
        embedding = model.get_input_embeddings()
        assert model.resize_token_embeddings(**call) is embedding
        require_sharded(model, vocabulary, parallel=parallel)
        found |= detached(weights_of(model), f"after call {step}")
    found |= detached(trained(model, vocabulary), "trained")
    model.resize_token_embeddings(3)  # at four ranks, the last holds nothing
    require_sharded(model, 3, parallel=parallel)
    found |= detached(trained(model, 3), "trained with three")
    return found | detached(saved(model), "saved")


def saved(model: Any) -> Tensors:
    """The file that rank 0 writes."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if rank > 0:
            return {}
        assert json.loads(Path(folder, "config.json").read_text())["vocab_size"] == 3
        return load_file(Path(folder, "model.safetensors"))


@FEATURE
@pytest.mark.parametrize(
    ("tied", "size"), [(True, 4), (False, 2)], ids=["tied at 4 ranks", "untied at 2"]
)
@pytest.mark.parametrize("family", sorted(CASES))
def test_the_vocabulary_is_resized(ranks, family, tied, size):
    """Growing, shrinking and padding give the values, losses and files of one process."""
    results = ranks(size).run(resized, family, tied, True)
    reference = resized(family, tied, False)
    for other in results[1:]:
        other.update({name: x for name, x in results[0].items() if name.startswith("saved/")})
    require_equal_ranks(results)
    require_close(results[0], reference, BEHIND_FLOAT32)
    for name, value in reference.items():
        if name.startswith("after call"):  # bit for bit: the same code on the same tensors
            assert torch.equal(results[0][name], value), name


def around_an_inner_model() -> Tensors:
    """A call on the model inside resizes what is tied to it outside; errors change nothing."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.transformer.resize_token_embeddings(101)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.placements == (Shard(0),)
    assert model.lm_head.weight.shape[0] == 101
    assert "resizing has replaced" in refusal(optimizer.step, RuntimeError)
    refusal(lambda: model.resize_token_embeddings(110, pad_to_multiple_of=2.5))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.placements == (Shard(0),)
    model.transformer.wte.requires_grad_(False)
    model.resize_token_embeddings(102)
    assert not model.lm_head.weight.requires_grad
    found = detached(weights_of(model), "weight")
    for operator in empty_shards._IDENTITIES:  # what an earlier job of this process has left
        empty_shards._handlers().pop(operator, None)
    model.resize_token_embeddings(1)  # one rank holds nothing
    weight = model.lm_head.weight.detach()
    assert weight.max().full_tensor() == weight.full_tensor().max()
    return found


def test_resizing_inside_a_model(ranks):
    """Ties reach beyond the model that is asked; stale optimizers and bad sizes are refused."""
    require_equal_ranks(ranks(2).run(around_an_inner_model))


def resized_differently(what: str) -> str:
    """The refusal of ranks that do not ask for the same."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True)
    rank = torch.distributed.get_rank()
    if what == "seed":
        torch.manual_seed(rank)
    size, mean = 101 + rank * (what == "size"), bool(rank) or what != "mean"
    told = refusal(lambda: model.resize_token_embeddings(size, mean_resizing=mean))
    assert model.lm_head.weight.shape[0] == 97
    return told


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("size", "new_num_tokens = 101 on rank 0, 102 on rank 1"),
        ("mean", "mean_resizing = False on rank 0, True on rank 1"),
        ("seed", "torch's random state"),
    ],
)
def test_ranks_must_resize_alike(ranks, what, told):
    """Other sizes or random states on some rank: one error on all, and nothing has changed."""
    for message in ranks(2).run(resized_differently, what):
        assert told in message


def test_the_reference_is_mean_resizing():
    """New rows are near the mean of the old ones: the maths under test is Transformers'."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=False)
    old = model.transformer.wte.weight.detach().clone()
    model.resize_token_embeddings(101)
    new = model.transformer.wte.weight[97:]
    torch.testing.assert_close(new, old.mean(0).expand(4, -1), rtol=0, atol=1e-3)
    assert new.std(0).max() > 0
