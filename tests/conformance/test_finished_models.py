"""Models that became parallel after they were built, and copies of parallel ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor

import tensorpar
from tensorpar.nn.linear import ColumnParallel
from tests.conformance.gpt2 import (
    Case,
    Tensors,
    batch,
    build,
    detached,
    is_parallel,
    outputs,
    perturbed,
    require_close,
    require_equal_ranks,
    weights_of,
)

PLAIN = Case(labels=False)


def finished(how: str, parallel: bool) -> Tensors:
    """Outputs and weights of a model that was made parallel after it got its weights."""
    model = perturbed(Case(), parallel=False)
    if parallel and how == "parallelize":
        assert tensorpar.parallelize(model) is model
        tensorpar.parallelize(model)  # a second time changes nothing
    elif parallel:
        tensorpar.set_tensor_parallelism(model)
        model = tensorpar.DistributedModel(model).get_module()
    assert is_parallel(model) == parallel
    return outputs(model, PLAIN) | detached(weights_of(model), "weight")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("how", ["parallelize", "mark"])
def test_a_finished_model_keeps_its_weights(ranks, how, size):
    """`parallelize`, or a mark carried out by `DistributedModel`, changes where weights live."""
    results = ranks(size).run(finished, how, True)
    require_equal_ranks(results)
    require_close(results[0], finished(how, False), 1e-10 if size > 1 else 1e-12)


def marked_in_part() -> list[bool]:
    """Whether each block's attention is sharded, when one block is marked off."""
    model = build(Case(), parallel=False)
    tensorpar.set_tensor_parallelism(model)
    tensorpar.set_tensor_parallelism(model.transformer.h[1], enabled=False)
    wrapped = tensorpar.DistributedModel(model)
    reference = build(Case(), parallel=False)
    require_close(outputs(wrapped.module, PLAIN), outputs(reference, PLAIN), 1e-10)
    return [isinstance(block.attn.c_attn, ColumnParallel) for block in model.transformer.h]


def test_a_mark_further_inside_wins(ranks):
    """A block that is marked off stays whole, replicated, and the model computes the same."""
    assert ranks(2).run(marked_in_part) == [[True, False]] * 2


def unmarked() -> tuple[bool, bool]:
    """How `DistributedModel` takes a model that nobody marked."""
    wrapped = tensorpar.DistributedModel(build(Case(), parallel=False))
    parameters = list(wrapped.parameters())
    reference = build(Case(), parallel=False)
    require_close(outputs(wrapped.module, PLAIN), outputs(reference, PLAIN), 1e-10)
    return (
        all(isinstance(p, DTensor) for p in parameters),
        any(wrapped.is_distributed_parameter(p) for p in parameters),
    )


def test_an_unmarked_model_is_replicated(ranks):
    """Without context or mark every parameter is a replicated DTensor."""
    assert ranks(2).run(unmarked) == [(True, False)] * 2


def deep_copied() -> dict[str, bool]:
    """A copy of a parallel model beside its original, after a step of the copy only."""
    model = perturbed(Case(), parallel=True)
    twin = copy.deepcopy(model)
    found = {
        "tied": twin.lm_head.weight is twin.transformer.wte.weight,
        "own": twin.lm_head.weight is not model.lm_head.weight,
        "bound to itself": twin.save_pretrained.__self__ is twin,
    }
    before, copied = outputs(model, PLAIN), outputs(twin, PLAIN)
    found["equal"] = all(torch.equal(copied[name], x) for name, x in before.items())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin.train()(**batch(Case())).loss.backward()
    optimizer.step()
    after, stepped = outputs(model, PLAIN), outputs(twin, PLAIN)
    found["original unmoved"] = all(torch.equal(after[name], x) for name, x in before.items())
    found["copy moved"] = not any(torch.equal(stepped[name], x) for name, x in before.items())
    greedy = {"max_new_tokens": 3, "do_sample": False}
    prompt = batch(PLAIN)["input_ids"][:, :4]
    found["generates"] = not torch.equal(
        model.generate(prompt, **greedy), torch.zeros(3, 7, dtype=torch.int64)
    )
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_deep_copy_is_a_parallel_model_of_its_own(ranks, size):
    """`copy.deepcopy` keeps the tie, computes the same, and shares nothing with the original."""
    for found in ranks(size).run(deep_copied):
        assert all(found.values()), found


def moved(dtype: torch.dtype) -> dict[str, bool]:
    """A parallel model after `.to(dtype)`."""
    model = build(Case(), parallel=True).to(dtype)
    loss = model.train()(**batch(Case())).loss
    loss.backward()
    return {
        "dtype": {p.dtype for p in model.parameters()} == {dtype},
        "gradient": {p.grad.dtype for p in model.parameters()} == {dtype},
        "parallel": is_parallel(model),
        "tied": model.lm_head.weight is model.transformer.wte.weight,
        "finite": bool(loss.isfinite()),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parallel_model_changes_its_dtype(ranks, dtype):
    """`model.to(dtype)` keeps parameters DTensors, tied and trainable."""
    for found in ranks(4).run(moved, dtype):
        assert all(found.values()), found
