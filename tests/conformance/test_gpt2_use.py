"""What users do around a forward: evaluate with gradients, accumulate, freeze, autocast, infer."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

import tensorpar
from tests.conformance.gpt2 import (
    Case,
    Tensors,
    batch,
    detached,
    gradients_of,
    perturbed,
    require_close,
    require_equal_ranks,
    tensors_of,
    weights_of,
)

PLAIN = Case(labels=False)


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def in_eval(parallel: bool) -> Tensors:
    """Gradients of the loss and of a function of the logits in eval mode."""
    model = perturbed(Case(), parallel=parallel).eval()
    output = model(**batch(Case()))
    assert type(output.logits) is torch.Tensor
    (output.loss + output.logits.square().mean()).backward()
    return detached(gradients_of(model), "gradient") | detached({"loss": output.loss}, "eval")


def read_logits(parallel: bool) -> Tensors:
    """Gradients of a loss to which the logits of a training step contribute as well."""
    model = perturbed(Case(), parallel=parallel)
    output = model(**batch(Case()))
    logits = _whole(output.logits)
    (output.loss + logits.square().mean()).backward()
    return detached(gradients_of(model), "gradient") | detached({"logits": logits}, "train")


def accumulated(parallel: bool) -> Tensors:
    """Gradients of two micro-batches, and of one graph walked twice."""
    model = perturbed(Case(), parallel=parallel)
    ids = batch(Case())["input_ids"]
    for rows in (slice(0, 1), slice(1, 3)):
        model(ids[rows], labels=ids[rows], num_items_in_batch=30).loss.backward()
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    loss.backward()
    return detached(gradients_of(model), "gradient")


def frozen(parallel: bool) -> Tensors:
    """The weights after a step with the embeddings and the first block frozen."""
    model = perturbed(Case(), parallel=False)
    for part in (model.transformer.wte, model.transformer.wpe, model.transformer.h[0]):
        part.requires_grad_(False)
    if parallel:
        tensorpar.parallelize(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    model.train()(**batch(Case())).loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    return detached(weights_of(model), "weight") | {f"frozen {names}": torch.zeros(1)}


def inferred(parallel: bool) -> Tensors:
    """Outputs under `torch.inference_mode`, then a training step of the same model."""
    model = perturbed(Case(), parallel=parallel).eval()
    with torch.inference_mode():
        seen = detached(tensors_of(model(batch(Case())["input_ids"])), "eval")
    model.train()(**batch(Case())).loss.backward()
    return {name: x.clone() for name, x in seen.items()} | detached(gradients_of(model), "grad")


WAYS = {f.__name__: f for f in (in_eval, read_logits, accumulated, frozen, inferred)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_usual_practice_equals_one_process(ranks, way, size):
    """Gradients in eval, of the logits, accumulated, beside frozen parts, equal one process."""
    results = ranks(size).run(WAYS[way], True)
    require_equal_ranks(results)
    require_close(results[0], WAYS[way](False), 1e-6)


def autocast(parallel: bool) -> tuple[torch.Tensor, Tensors]:
    """Loss and gradients of a float32 model under bfloat16 autocast."""
    model = perturbed(Case(dtype=torch.float32), parallel=parallel)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(Case())).loss
    loss.backward()
    return loss.detach(), detached(gradients_of(model), "gradient")


@pytest.mark.parametrize("size", [2, 4])
def test_autocast(ranks, size):
    """Under bfloat16 autocast the error is that of bfloat16, and gradients stay float32."""
    results = ranks(size).run(autocast, True)
    require_equal_ranks([gradients for _, gradients in results])
    loss, gradients = autocast(False)
    assert abs(results[0][0] - loss) < 0.03 * loss
    for name, x in results[0][1].items():
        assert x.dtype is torch.float32
        assert (x - gradients[name]).norm() < 0.1 * gradients[name].norm() + 1e-3, name


def raised_within() -> Tensors:
    """A forward after one that raised inside a layer, and the random state after it."""
    model = perturbed(Case(config={"attn_pdrop": 0.5}), parallel=True)

    def fail(*_: object) -> None:
        raise ArithmeticError

    handle = model.transformer.h[1].attn.c_attn.register_forward_hook(fail)
    torch.manual_seed(1)
    with pytest.raises(ArithmeticError):
        model(**batch(Case()))
    handle.remove()
    after_failure = torch.rand(1)
    torch.manual_seed(1)
    loss = model(**batch(Case())).loss
    loss.backward()
    logits = model.eval()(batch(PLAIN)["input_ids"]).logits
    return {"rand": after_failure, "loss": loss.detach(), "logits": logits.detach()}


def test_a_forward_that_raises_leaves_its_doors_closed(ranks):
    """After an exception within a layer, random states agree and the next forward works."""
    require_equal_ranks(ranks(2).run(raised_within))
