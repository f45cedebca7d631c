"""What happens to a model between its construction and its end, on parallel ones as in one process.

Copies, dtypes, frozen parts, pickles, and layers that a subclass adds by itself.
"""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GPT2LMHeadModel

import tensorpar
from tests.collectives import Collectives
from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    build,
    inputs,
    tiny_config,
)
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    gradients_of,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)

FAMILIES = pytest.mark.parametrize("family", sorted(CASES))


def feature(name: str) -> pytest.MarkDecorator:
    """A test that proves a cell of the README's table."""
    return pytest.mark.feature(name)


def step(model: Any, family: str) -> Tensors:
    """Loss and gradients of one training forward with labels."""
    model.zero_grad()
    loss = model(**inputs(CASES[family].model, labels=True)).loss
    loss.backward()
    return {"loss": loss.detach().double()} | detached(gradients_of(model), "gradient")


def logits(model: Any, family: str) -> torch.Tensor:
    """What the model says in eval, whole."""
    with torch.no_grad():
        return model.eval()(**inputs(CASES[family].model, labels=False)).logits


def counted(family: str, parallel: bool) -> list[int]:
    """Every way to count parameters, of a model partly frozen."""
    model = build(family, CASES[family].model, parallel=parallel)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.LayerNorm):
            module.requires_grad_(False)
    return [
        model.num_parameters(only_trainable=trainable, exclude_embeddings=without)
        for trainable in (False, True)
        for without in (False, True)
    ]


@feature("num_parameters")
@FAMILIES
def test_parameters_are_counted_globally(ranks, family):
    """`num_parameters` says what it says in one process."""
    reference = counted(family, False)
    assert len(set(reference)) > 2
    assert ranks(4).run(counted, family, True) == [reference] * 4


def lived(family: str, parallel: bool) -> Tensors:
    """One model after another way of life; each gives what must equal one process's."""
    model = build(family, CASES[family].model, parallel=parallel)
    found: Tensors = {}
    found |= detached(step(model.train(), family), "whole")
    found |= _frozen(model, family)
    found |= _modes(model)
    found |= _copied(model, family)
    if parallel:
        _pickled(model, family)
    return found | _in_other_dtypes(model, family)


def _frozen(model: Any, family: str) -> Tensors:
    found: Tensors = {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for part, kept in (("embedding", [embedding]), ("all but the head", [head])):
        model.requires_grad_(part == "embedding")
        for module in kept:
            module.requires_grad_(part != "embedding")
        model.zero_grad(set_to_none=True)
        got = step(model.train(), family)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen
        assert not frozen & {name.removeprefix("gradient/") for name in got}
        found |= detached(got, part)
    model.requires_grad_(True)
    return found


def _modes(model: Any) -> Tensors:
    for mode in (True, False):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}
    return {}


def _copied(model: Any, family: str) -> Tensors:
    twin = copy.deepcopy(model)
    before = logits(model, family)
    assert torch.equal(logits(twin, family), before)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (twin.get_output_embeddings().weight is twin.get_input_embeddings().weight) == tied
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    found = detached(step(twin.train(), family), "copy")
    optimizer.step()
    assert torch.equal(logits(model, family), before)
    found |= detached(weights_of(twin), "stepped copy")
    twin.resize_token_embeddings(101)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 97
    return found


def _pickled(model: Any, family: str) -> None:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    before, gradients = logits(model, family), step(model.train(), family)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert [type(m).__mro__[1:] for m in twin.modules()] == [
            type(m).__mro__[1:] for m in model.modules()
        ]
        assert torch.equal(logits(twin, family), before)
        again = step(twin.train(), family)
        assert all(torch.equal(again[name], x) for name, x in gradients.items())
        assert twin.save_pretrained.__func__ is model.save_pretrained.__func__
        assert twin.save_pretrained.__self__ is twin


def _in_other_dtypes(model: Any, family: str) -> Tensors:
    found: Tensors = {}
    for name, cast in (
        ("bfloat16", lambda: model.to(torch.bfloat16)),
        ("half", model.half),
        ("float", model.float),
        ("double", model.double),
    ):
        cast()
        dtypes = {p.dtype for p in model.parameters()}
        assert dtypes == {getattr(torch, name)}
        assert {local.dtype for local in map(_local, model.parameters())} == dtypes
        got = step(model.train(), family)
        assert {p.grad.dtype for p in model.parameters()} == dtypes
        assert got["loss"].isfinite()
        if name in ("float", "double"):
            found |= detached({"weight": next(iter(weights_of(model).values())).double()}, name)
    return found


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@feature("deepcopy")
@feature("pickling")
@feature(".to(dtype), .half(), .double()")
@feature("requires_grad_(False) on parts")
@feature("train, eval")
@FAMILIES
def test_a_model_lives_as_in_one_process(ranks, family):
    """Frozen parts, copies, pickles and dtypes: losses, gradients and weights of one process."""
    results = ranks(2).run(lived, family, True)
    require_equal_ranks(results)
    reference = lived(family, False)
    require_close(results[0], reference, BEHIND_FLOAT32)


def all_reduces(trainable: str) -> tuple[int, int]:
    """Collectives forward and backward of a GPT-2 of which only some parameters train."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True, check_batches=False).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    with Collectives() as seen:
        loss = model(**inputs("GPT2LMHeadModel", labels=True)).loss
        forward = seen.counts.total()
        loss.backward()
        return forward, seen.counts.total() - forward


@pytest.mark.parametrize(
    ("trainable", "backward"), [("", 5), ("h.1.mlp", 1), ("h.1.attn", 2), ("ln_f", 1)]
)
def test_frozen_parts_cost_no_communication(ranks, trainable, backward):
    """Backward all-reduces end where the deepest trainable parameter is."""
    for forward, back in ranks(2).run(all_reduces, trainable):
        assert forward == 1 + 2 * 2 + 2
        assert back == backward


class Extended(GPT2LMHeadModel):
    """A user's model: it adds layers after its parent is built, and uses parameters directly."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.n_embd
        self.extra = nn.Linear(width, width)
        self.shift = nn.Parameter(torch.full((width,), 0.1))
        self.mixing = nn.MultiheadAttention(width, 5, batch_first=True)
        self.stack = nn.ModuleList()
        self.stack.append(nn.Linear(width, width))
        self.stack[0].register_parameter("gain", nn.Parameter(torch.ones(width)))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        """Hidden states through all of the added layers, and the loss."""
        hidden = self.transformer(input_ids)[0] + self.shift
        hidden = hidden + self.extra(hidden) + F.linear(hidden, self.extra.weight)
        hidden = hidden + self.mixing(hidden, hidden, hidden, need_weights=False)[0]
        hidden = self.stack[0](hidden) * self.stack[0].gain
        scores = self.lm_head(hidden)
        return self.loss_function(scores, labels, vocab_size=self.config.vocab_size)


def extended(parallel: bool, how: str) -> Tensors:
    """Training of the user's model, which must be parallel as soon as it is built."""
    torch.manual_seed(0)
    context = tensorpar.tensor_parallelism() if parallel and how == "context" else nullcontext()
    with default_dtype(torch.float64), context:
        model = Extended(tiny_config("gpt2"))
        if parallel and how == "parallelize":
            tensorpar.parallelize(model)
        assert {isinstance(p, DTensor) for p in model.parameters()} == {parallel}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = inputs("GPT2LMHeadModel", labels=True)["input_ids"]
    losses = []
    for _ in range(3):
        loss = model.train()(tokens, labels=tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        found = detached(gradients_of(model), "gradient")
        optimizer.zero_grad()
    assert isinstance(model.shift, DTensor) == parallel
    return found | {"losses": torch.stack(losses).double()} | detached(weights_of(model), "weight")


@pytest.mark.parametrize("how", ["context", "parallelize"])
def test_layers_and_parameters_that_a_subclass_adds(ranks, how):
    """They join the parallel model at once, and may be used by modules that do not own them."""
    results = ranks(2).run(extended, True, how)
    require_equal_ranks(results)
    require_close(results[0], extended(False, how), BEHIND_FLOAT32)


def of_other_depth() -> str:
    """What ranks are told whose models have another number of layers and other values."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    model = GPT2LMHeadModel(tiny_config("gpt2", layers=1 + rank))
    return refusal(lambda: tensorpar.parallelize(model))


def test_other_shapes_are_told_before_other_values(ranks):
    """A layer that one rank lacks is not hidden behind checksums that differ as well."""
    for told in ranks(2).run(of_other_depth):
        facts = told.partition("on every rank, or load")[2].split("; ")
        assert len(facts) == 6
        assert all("transformer.h.1." in fact and "absent" in fact for fact in facts[:5]), told
