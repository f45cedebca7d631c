"""Every model class of every family computes on several ranks what it computes in one process."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers

import tensorpar
from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    EXACT,
    HEADS,
    IN_FLOAT32,
    build,
    inputs,
    outputs_and_gradients,
    probe,
)
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    require_close,
    require_equal_ranks,
    scale_of,
    weights_of,
)


def trained_with_labels(family: str, head: str, parallel: bool) -> Tensors:
    """The model's own losses, and the weights after three clipped steps of each optimizer."""
    model = build(family, head, parallel=parallel).train()
    optimizers = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        # a gradient that is nothing but float32's rounding must not become a step of `lr`
        torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-5),
    )
    losses, found = [], {}
    for optimizer in optimizers:
        for _ in range(3):
            loss = model(**inputs(head, labels=True)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        found |= detached(weights_of(model), type(optimizer).__name__)
    return {"losses": torch.stack(losses)} | found


ADAMW = {2: {"fused": True}, 4: {"foreach": True}}


def trained_by_adamw(family: str, size: int, parallel: bool) -> Tensors:
    """How three clipped steps on a float64 scalar made of the logits move the weights.

    AdamW divides a gradient by its own size: what is nothing but rounding, such as the gradient of
    a key's bias, becomes a step of up to `lr` once the rounding reaches `eps`. In float64 it stays
    at 1e-16 of the gradients, eight decades below; behind a loss in float32 it would not.
    """
    model = build(family, CASES[family].model, parallel=parallel, fused_attention=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-8, **ADAMW[size])
    before = detached(weights_of(model), "step")
    given = inputs("", labels=False)
    for _ in range(3):
        probe(model(**given), given["attention_mask"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = detached(weights_of(model), "step")
    return {name: x - before[name] for name, x in after.items()}


def test_no_class_is_missed():
    """The list names every model class that Transformers exports for the families."""
    listed = {head for _, head in HEADS}
    for case in CASES.values():
        base = getattr(transformers, case.heads[0])
        module = inspect.getmodule(base)
        exported = {
            name
            for name, cls in vars(module).items()
            if inspect.isclass(cls)
            and issubclass(cls, transformers.PreTrainedModel)
            and cls.__module__ == module.__name__
            and not name.endswith("PreTrainedModel")
            and hasattr(transformers, name)
        }
        assert exported <= listed, f"{case.name}: {exported - listed}"


@pytest.mark.feature("every class: outputs, hidden states and gradients")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_law_parity_of_every_class(ranks, family, head, size):
    """Outputs, hidden states and every gradient equal one process's in float64."""
    options = {"fused_attention": False}
    results = ranks(size).run(outputs_and_gradients, family, head, True, options)
    require_equal_ranks(results)
    require_close(results[0], outputs_and_gradients(family, head, False, {}), EXACT)


@pytest.mark.feature("attention fused by tensorpar")
@pytest.mark.parametrize("family", sorted(IN_FLOAT32))
def test_fused_attention_computes_the_same(ranks, family):
    """The fused kernel agrees with Transformers' float32 scores, local windows included."""
    case = CASES[family]
    results = ranks(2).run(outputs_and_gradients, family, case.model, True, {})
    require_equal_ranks(results)
    reference = outputs_and_gradients(family, case.model, False, {})
    assert not torch.equal(results[0]["output/logits"], reference["output/logits"])
    require_close(results[0], reference, BEHIND_FLOAT32 * scale_of(reference))


@pytest.mark.feature(
    "training with labels, -100 among them: loss, weights after 3 steps of SGD, then AdamW"
)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("family", "head"), [pair for pair in HEADS if "Model" not in pair[1][-5:]]
)
def test_training_with_labels(ranks, family, head, size):
    """Losses and the weights after three clipped steps of both optimizers equal one process's.

    Transformers casts logits of some language models to float32 for their loss.
    """
    results = ranks(size).run(trained_with_labels, family, head, True)
    require_equal_ranks(results)
    reference = trained_with_labels(family, head, False)
    assert results[0]["losses"].dtype == reference["losses"].dtype
    in_float32 = family in IN_FLOAT32 or reference["losses"].dtype == torch.float32
    tolerance = BEHIND_FLOAT32 * scale_of(reference) if in_float32 else EXACT
    require_close(results[0], reference, tolerance)


@pytest.mark.feature("weights after 3 clipped steps of AdamW")
@pytest.mark.parametrize("size", sorted(ADAMW))
@pytest.mark.parametrize("family", sorted(CASES))
def test_training_by_adamw(ranks, family, size):
    """Stock AdamW, fused and foreach, moves every weight as in one process."""
    results = ranks(size).run(trained_by_adamw, family, size, True)
    require_equal_ranks(results)
    reference = trained_by_adamw(family, size, False)
    require_close(results[0], reference, EXACT)
    assert all(x.abs().max() > 1e-9 for x in reference.values())


def attentions(family: str, parallel: bool) -> list[torch.Tensor]:
    """Recorded attention weights of every layer."""
    model = build(family, CASES[family].heads[0], parallel=parallel).eval()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return list(model(**inputs("", labels=False), output_attentions=True).attentions)


@pytest.mark.feature("output_attentions: all heads, in order")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(CASES))
def test_attentions_have_all_heads_in_order(ranks, family, size):
    """`output_attentions` returns what one process returns, an idle rank included."""
    reference = attentions(family, False)
    for result in ranks(size).run(attentions, family, True):
        assert len(result) == len(reference) > 0
        for ours, theirs in zip(result, reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


def built_with_sdpa(family: str) -> tuple[bool, bool, bool]:
    """Whether sdpa is accepted inside the context, refused without fusing, and refused outside."""
    config = CASES[family].config(attn_implementation="sdpa")
    cls = getattr(transformers, CASES[family].model)

    def refused() -> bool:
        try:
            cls(copy.deepcopy(config))
        except ValueError:
            return True
        return False

    with tensorpar.tensor_parallelism():
        inside = refused()
    with tensorpar.tensor_parallelism(fused_attention=False):
        unfused = refused()
    return inside, unfused, refused()


@pytest.mark.parametrize("family", sorted(IN_FLOAT32))
def test_sdpa_is_accepted_inside_the_context(ranks, family):
    """Transformers refuses sdpa for these models; under tensor parallelism it is what they get."""
    assert ranks(2).run(built_with_sdpa, family) == [(False, True, True)] * 2
