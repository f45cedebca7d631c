"""`torch.compile` of parallel models: the numbers of one process, and collectives as without it.

The reference is Transformers' model in one process, uncompiled. No dispatch mode may be open around
a compiled model (`CommDebugMode` is one): under it nothing is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tensorpar
from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    EXACT,
    IN_FLOAT32,
    inputs,
    perturb,
    tiny_config,
)
from tests.conformance.gpt2 import (
    Tensors,
    checkpoint_activations,
    default_dtype,
    detached,
    gradients_of,
    refusal,
    require_close,
    require_equal_ranks,
    tensors_of,
)

#: batch and sequence of each training step; the second and the third are compiled anew.
SIZES = [(3, 9), (2, 6), (1, 7)]


def built(family: str, *, parallel: bool, dropout: float = 0.0, **options: Any) -> Any:
    """A perturbed model of one layer; the parallel one is constructed within the context."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config = tiny_config(family, layers=1)
    for name in [name for name in vars(config) if "drop" in name]:
        if isinstance(getattr(config, name), float):
            setattr(config, name, dropout)
    cls = getattr(transformers, CASES[family].model)
    with default_dtype(torch.float64):
        reference = cls(config)
        perturb(reference)
        if not parallel:
            return reference
        with tensorpar.tensor_parallelism(**options):
            model = cls(config)
    tensorpar.DistributedModel(model).load_state_dict(reference.state_dict())
    return model


def batch(family: str, size: tuple[int, int] = SIZES[0]) -> dict[str, torch.Tensor]:
    """Forward arguments with labels, of a batch and a sequence."""
    given = inputs(CASES[family].model, labels=True)
    rows, columns = size
    return {name: value[:rows, :columns].contiguous() for name, value in given.items()}


def step(call: Callable[..., Any], model: nn.Module, given: dict[str, torch.Tensor]) -> Tensors:
    """Loss and every gradient of one training forward."""
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    loss = call(**given).loss
    loss.backward()
    return {"loss": loss.detach()} | detached(gradients_of(model), "gradient")


def lived(family: str, backend: str | None) -> Tensors:
    """Training steps of several sizes, then eval with and without labels; compiled if parallel."""
    model = built(family, parallel=backend is not None)
    call = model if backend is None else torch.compile(model, backend=backend)
    found: Tensors = {}
    for size in SIZES:
        found |= detached(step(call, model, batch(family, size)), str(size))
    model.eval()
    with torch.no_grad():
        given = batch(family)
        found |= detached(tensors_of(call(**given)), "eval")
        del given["labels"]
        found |= detached(tensors_of(call(**given)), "eval without labels")
    if backend is not None:
        require_compiled()
    return found


def require_compiled() -> None:
    """Most of the model was traced: nothing has made the compiler give up without a word."""
    captured = torch._dynamo.utils.counters["stats"]["calls_captured"]
    assert captured > 60, captured


@pytest.mark.feature("torch.compile")
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_compiled_model_agrees_with_one_process(ranks, family):
    """Losses, all gradients and logits, in train and eval, of batches of several sizes."""
    results = ranks(2).run(lived, family, "aot_eager")
    require_equal_ranks(results)
    tolerance = BEHIND_FLOAT32 if family in IN_FLOAT32 else EXACT
    require_close(results[0], lived(family, None), tolerance)


def num_collectives(call: Callable[..., Any], model: nn.Module) -> int:
    """How many collectives one training step calls."""
    with profile(activities=[ProfilerActivity.CPU]) as told:
        step(call, model, batch("gpt2"))
    return sum(event.count for event in told.key_averages() if event.key.startswith("gloo:"))


def other_ways(dropout: float) -> None:
    """A GPT-2 compiled in place, wrapped and recomputed; each is compared with its uncompiled self.

    At degree 6 the last rank has no head, so that ranks trace graphs that are not the same.
    """
    model = built("gpt2", parallel=True, dropout=dropout)
    plain, counted = step(model, model, batch("gpt2")), num_collectives(model, model)
    compiled = torch.compile(model, backend="aot_eager")
    require_close(step(compiled, model, batch("gpt2")), plain, EXACT)
    assert num_collectives(compiled, model) == counted > 0
    require_compiled()
    wrapped = torch.compile(tensorpar.DistributedModel(model), backend="aot_eager")
    require_close(step(wrapped, model, batch("gpt2")), plain, EXACT)
    checkpoint_activations(model)
    require_close(step(compiled, model, batch("gpt2")), plain, EXACT)
    model.gradient_checkpointing_disable()
    model.compile(backend="eager")
    require_close(step(model, model, batch("gpt2")), plain, EXACT)


@pytest.mark.parametrize(("degree", "dropout"), [(2, 0.2), (3, 0.0)])
def test_other_ways_to_compile(ranks, degree, dropout):
    """`model.compile()`, `DistributedModel`, recomputed layers; as many collectives as without."""
    ranks(degree).run(other_ways, dropout)


def whole_graph() -> str:
    """What a user is told who asks for one graph."""
    model = built("gpt2", parallel=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    return refusal(lambda: compiled(**batch("gpt2")), Exception)


def test_one_graph_is_refused(ranks):
    """`fullgraph=True`: the message says which function of ours stays outside graphs."""
    for told in ranks(2).run(whole_graph):
        assert "tensorpar" in told
        assert "fullgraph" in told


_ = nullcontext
