"""Every forward argument that Transformers takes, by family: one process's outputs, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    EXACT,
    IN_FLOAT32,
    build,
    build_causal,
    compared,
    inputs,
)
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    gradients_of,
    require_close,
    require_equal_ranks,
    scale_of,
    tensors_of,
)

HEADS_COUNT, LENGTH, WIDTH = 5, 9, 40
HIDDEN_STATES = {"output_hidden_states": True}


def _additive(*shape: int) -> torch.Tensor:
    """A causal mask `[3, heads or 1, 9, 9]` with a third of the rest hidden; no query sees none."""
    generator = torch.Generator().manual_seed(3)
    shown = torch.rand(shape, generator=generator) > 0.33
    shown = (shown & torch.ones(LENGTH, LENGTH).tril().bool()) | torch.eye(LENGTH).bool()
    return torch.zeros(shape, dtype=torch.float64).masked_fill(
        ~shown, torch.finfo(torch.float32).min
    )


def _types(family: str) -> dict[str, Any]:
    kinds = 2 if family in ("bert", "roberta") else 97
    generator = torch.Generator().manual_seed(4)
    return {"token_type_ids": torch.randint(kinds, (3, LENGTH), generator=generator)}


def _positions(_: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {"position_ids": torch.randint(16, (3, LENGTH), generator=generator)}


def _embeds(_: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(3, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    return {"input_ids": None, "inputs_embeds": values.requires_grad_()}


ARGUMENTS: dict[str, Any] = {
    "4-D attention mask": lambda _: {"attention_mask": _additive(3, 1, LENGTH, LENGTH)},
    "attention mask per head": lambda _: {
        "attention_mask": _additive(3, HEADS_COUNT, LENGTH, LENGTH)
    },
    "token_type_ids": _types,
    "position_ids": _positions,
    "inputs_embeds": _embeds,
    "return_dict=False": lambda _: {"return_dict": False},
}
PAIRS = [
    pytest.param(name, family, marks=pytest.mark.feature(name))
    for name in ARGUMENTS
    for family in CASES
    if (name, family) != ("token_type_ids", "gptneox")  # it has no such argument
]


def with_argument(name: str, family: str, parallel: bool, fused: bool = False) -> Tensors:
    """Outputs and gradients of a forward with one more argument."""
    model = build(family, CASES[family].model, parallel=parallel, fused_attention=fused)
    given = {**inputs("", labels=False), **ARGUMENTS[name](family)}
    mask = given["attention_mask"] if given["attention_mask"].ndim == 2 else None
    return compared(model, {**given, **HIDDEN_STATES}, mask)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_argument(ranks, name, family):
    """Outputs, all hidden states and all gradients equal one process's; so do the input's."""
    results = ranks(2).run(with_argument, name, family, True)
    require_equal_ranks(results)
    require_close(results[0], with_argument(name, family, False), EXACT)


def all_at_once(family: str, parallel: bool) -> Tensors:
    """Outputs and gradients of every class, given embeddings, positions and token types."""
    generator, found = torch.Generator().manual_seed(8), {}
    for head in CASES[family].heads:
        model = build(family, head, parallel=parallel, fused_attention=False)
        given = inputs(head, labels=False)
        shape = given["input_ids"].shape
        if "DoubleHeads" not in head:  # there Transformers fails on both of them, given per choice
            values = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
            given |= {"input_ids": None, "inputs_embeds": values.requires_grad_()}
            given["position_ids"] = torch.randint(16, shape, generator=generator)
        if family != "gptneox":
            given["token_type_ids"] = torch.randint(2, shape, generator=generator)
        seen = compared(model, {**given, **HIDDEN_STATES}, given["attention_mask"])
        found |= {f"{head}/{name}": x for name, x in seen.items()}
    return found


@pytest.mark.feature("arguments together, every class")
@pytest.mark.parametrize("family", sorted(CASES))
def test_arguments_of_every_class(ranks, family):
    """Outputs, hidden states and gradients, those of the embeddings included."""
    results = ranks(2).run(all_at_once, family, True)
    require_equal_ranks(results)
    require_close(results[0], all_at_once(family, False), EXACT)


@pytest.mark.feature("boolean 4-D attention mask")
@pytest.mark.parametrize("family", sorted(CASES))
def test_boolean_mask(ranks, family):
    """Where attention is fused, a boolean mask means what it means to the kernel: True is seen."""
    results = ranks(2).run(boolean_mask, family, True)
    require_equal_ranks(results)
    reference = boolean_mask(family, False)
    tolerance = BEHIND_FLOAT32 * scale_of(reference) if family in IN_FLOAT32 else EXACT
    require_close(results[0], reference, tolerance)


def boolean_mask(family: str, parallel: bool) -> Tensors:
    """Outputs and gradients; Transformers' unfused maths would add the booleans as numbers."""
    model = build(family, CASES[family].model, parallel=parallel)
    mask = _additive(3, 1, LENGTH, LENGTH)
    seen = mask if family in IN_FLOAT32 and not parallel else mask == 0
    return compared(model, {**inputs("", labels=False), "attention_mask": seen})


def changed_mask(family: str, parallel: bool) -> Tensors:
    """Logits with one mask tensor before and after its values are changed in place."""
    model = build(family, CASES[family].model, parallel=parallel).eval()
    mask, found = _additive(3, 1, LENGTH, LENGTH), {}
    with torch.no_grad():
        for name in ("before", "after"):
            given = {**inputs("", labels=False), "attention_mask": mask}
            found[name] = model(**given).logits
            mask[:, :, -1, 0] = torch.finfo(torch.float32).min
            mask[:, :, -1, -2:] = 0
    return found


@pytest.mark.parametrize("family", sorted(IN_FLOAT32))
def test_a_mask_may_be_changed_between_forwards(ranks, family):
    """What was prepared from a mask is not used once the mask says something else."""
    results = ranks(2).run(changed_mask, family, True)
    require_close(results[0], changed_mask(family, False), 1e-5)
    assert not torch.equal(results[0]["before"], results[0]["after"])


LOGITS_TO_KEEP = {"logits_to_keep": 4, "logits_to_keep, positions": torch.tensor([0, 4, 8])}


def some_logits(family: str, parallel: bool) -> Tensors:
    """Outputs and gradients with only some logits computed, either way of choosing them."""
    model, found = build_causal(family, parallel=parallel, fused_attention=False), {}
    for name, kept in LOGITS_TO_KEEP.items():
        given = {**inputs("", labels=False), "logits_to_keep": kept}
        assert model(**given).logits.shape == (
            3,
            4 if kept is LOGITS_TO_KEEP["logits_to_keep"] else 3,
            97,
        )
        found |= {f"{name}/{key}": x for key, x in compared(model, given).items()}
        model.zero_grad()
    return found


@pytest.mark.feature("logits_to_keep")
@pytest.mark.parametrize("family", sorted(CASES))
def test_logits_to_keep(ranks, family):
    """The last logits, or those of chosen positions, and the gradients they give."""
    results = ranks(2).run(some_logits, family, True)
    require_equal_ranks(results)
    require_close(results[0], some_logits(family, False), EXACT)


def tuples_with_labels(family: str, parallel: bool) -> Tensors:
    """What every class with a loss returns as a tuple, and the gradients of its first element."""
    found: Tensors = {}
    for head in (CASES[family].model, *CASES[family].heads[1:]):
        model = build(family, head, parallel=parallel)
        given = {**inputs(head, labels=True), "return_dict": False}
        with torch.no_grad():
            seen = model.eval()(**given)
        assert type(seen) is tuple
        assert all(type(x) is torch.Tensor for x in seen[:2])
        found |= detached(tensors_of(seen), f"{head}/eval")
        output = model.train()(**given)
        output[0].backward()
        found |= detached(tensors_of(output), f"{head}/train")
        found |= detached(gradients_of(model), f"{head}/gradient")
    return found


@pytest.mark.feature("return_dict=False with labels")
@pytest.mark.parametrize("family", sorted(CASES))
def test_tuples_with_labels(ranks, family):
    """Loss first, then whatever one process returns, for every class; labels hold -100."""
    results = ranks(2).run(tuples_with_labels, family, True)
    require_equal_ranks(results)
    reference = tuples_with_labels(family, False)
    require_close(results[0], reference, BEHIND_FLOAT32 * scale_of(reference))


def streamed_logits(family: str, parallel: bool) -> Tensors:
    """Logits of decoding by hand with the model's own cache, two or three tokens at a time."""
    model = build_causal(family, parallel=parallel, fused_attention=False).eval()
    ids = inputs("", labels=False)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found, cache = {}, None
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 5), (5, 6), (6, 9)):
            given = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            output = model(**given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found[f"{start}"] = output.logits * mask[:, start:stop, None]
        assert model(ids, use_cache=False).past_key_values is None
    return found


@pytest.mark.feature("past_key_values passed on by hand")
@pytest.mark.parametrize("family", sorted(CASES))
def test_decoding_by_hand_with_a_cache(ranks, family):
    """Steps that pass `past_key_values` on give one process's logits, the same on all ranks."""
    results = ranks(4).run(streamed_logits, family, True)
    require_equal_ranks(results)
    require_close(results[0], streamed_logits(family, False), EXACT)
