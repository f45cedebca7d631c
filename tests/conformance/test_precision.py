"""Half precision: the error against float64 is that of one process in the same precision.

Both are sums of roundings, which differ from rank to rank as they do from seed to seed; what is
compared is their root mean square over all logits, or all gradients, of several seeds.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.conformance.families import CASES, build_causal, inputs, without_padding
from tests.conformance.gpt2 import Tensors, gradients_of, require_equal_ranks, tensors_of

SEEDS = range(2)
#: the way of computing to the dtype of the parameters and of autocast.
WAYS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16),
    "autocast to float16": (torch.float32, torch.float16),
}
#: loss scaling, without which float16's gradients would underflow.
SCALE = 64.0


def computed(family: str, way: str | None, reference: str, parallel: bool) -> list[Tensors]:
    """Logits and gradients of each seed; for no way, in float64 from the weights of `reference`."""
    dtype, autocast = WAYS[way or reference]
    found = []
    for seed in SEEDS:
        model = build_causal(family, parallel=parallel, dtype=dtype, seed=seed).train()
        if way is None:
            model, autocast = model.double(), None
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            output = model(**inputs("LM", labels=True))
        (output.loss * SCALE).backward()
        # a padded query of a local window sees no key, and its logits mean nothing
        mask = inputs("LM", labels=False)["attention_mask"]
        logits = without_padding(tensors_of(output)["logits"].detach(), mask)
        found.append({"logits": logits, **gradients_of(model)})
    return found


def error(ours: list[Tensors], exact: list[Tensors], *, of_logits: bool) -> float:
    """Root mean square of the difference, relative to that of the values."""
    pairs = [
        (one[name].double(), true[name])
        for one, true in zip(ours, exact, strict=True)
        for name in true
        if (name == "logits") == of_logits
    ]
    difference = sum(float((x - y).square().sum()) for x, y in pairs)
    return (difference / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5


def dtypes_of(results: list[Tensors]) -> dict[str, torch.dtype]:
    """By name."""
    return {name: x.dtype for name, x in results[0].items()}


@pytest.mark.parametrize(
    ("way", "family"),
    [pytest.param(way, family, marks=pytest.mark.feature(way)) for way in WAYS for family in CASES],
)
def test_error_is_that_of_one_process(ranks, family, way):
    """At most twice the error of one process in the same precision, and the same dtypes."""
    exact = computed(family, None, way, False)
    alone = computed(family, way, way, False)
    together = ranks(4).run(computed, family, way, way, True)[0]
    assert dtypes_of(together) == dtypes_of(alone)
    for of_logits in (True, False):
        ours = error(together, exact, of_logits=of_logits)
        theirs = error(alone, exact, of_logits=of_logits)
        assert 0 < ours <= 2 * theirs


def with_masters(family: str, dtype: torch.dtype, parallel: bool) -> Tensors:
    """Float32 masters after steps of which each is less than `dtype` resolves in the weights."""
    model = build_causal(family, parallel=parallel, dtype=torch.bfloat16).to(dtype).train()
    own = list(model.parameters())
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    masters = [p.detach().to(exact, copy=True).requires_grad_() for p in own]
    optimizer = torch.optim.SGD(masters, lr=1e-3, momentum=0.9)
    start = [x.detach().clone() for x in masters]
    for _ in range(4):
        model(**inputs("LM", labels=True)).loss.backward()
        for p, master in zip(own, masters, strict=True):
            master.grad, p.grad = p.grad.to(exact), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(own, masters, strict=True):
                p.copy_(master)
    moved = [x.detach() - before for x, before in zip(masters, start, strict=True)]
    return {f"{number}": whole(x) for number, x in enumerate(moved)}


def whole(x: torch.Tensor) -> torch.Tensor:
    """A parameter's elements in an order that layouts do not change."""
    full = x.full_tensor() if isinstance(x, DTensor) else x
    return full.flatten().sort().values


@pytest.mark.feature("bfloat16 parameters with float32 master weights")
@pytest.mark.parametrize("family", sorted(CASES))
def test_master_weights(ranks, family):
    """A user's own float32 copies are stepped and written back; the error is one process's."""
    exact = [with_masters(family, torch.float64, False)]
    alone = [with_masters(family, torch.bfloat16, False)]
    results = ranks(2).run(with_masters, family, torch.bfloat16, True)
    require_equal_ranks(results)
    ours, theirs = (error(found, exact, of_logits=False) for found in (results[:1], alone))
    assert 0 < ours <= 2 * theirs


def cast(family: str, parallel: bool) -> dict[str, Any]:
    """Dtypes of parameters, buffers and outputs after `.to`, and what masks do in it."""
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = build_causal(family, parallel=parallel).to(dtype).eval()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        found |= {f"{dtype}/{name}": x.dtype for name, x in tensors.items()}
        given = inputs("", labels=False)
        given["attention_mask"] = given["attention_mask"].flip(-1)  # left padding hides queries
        with torch.no_grad():
            output = tensors_of(model(**given, output_hidden_states=True))
        found |= {f"{dtype}/output/{name}": x.dtype for name, x in output.items()}
        found[f"{dtype}/finite"] = bool(output["logits"].isfinite().all())
    return found


@pytest.mark.feature(".to(dtype): parameters, buffers, masks and outputs")
@pytest.mark.parametrize("family", sorted(CASES))
def test_dtypes(ranks, family):
    """`.to(dtype)` gives every tensor the dtype that it has in one process."""
    assert ranks(2).run(cast, family, True) == [cast(family, False)] * 2
