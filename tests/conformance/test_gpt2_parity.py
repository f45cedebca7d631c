"""Law parity: a sharded GPT-2 computes what Transformers computes in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance.gpt2 import (
    Case,
    Tensors,
    batch,
    detached,
    gradients_of,
    loss_of,
    perturbed,
    require_close,
    require_equal_ranks,
    tensors_of,
    weights_of,
)

HEADS = [
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
]
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd foreach": (torch.optim.SGD, {"lr": 0.1, "foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"lr": 1e-4, "eps": 1e-8, "fused": True}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 1e-4, "eps": 1e-8, "foreach": True}),
}


def forward_and_backward(case: Case, parallel: bool) -> Tensors:
    """Outputs in eval and train, the loss, and every gradient before and after clipping."""
    model, inputs = perturbed(case, parallel=parallel), batch(case)
    differentiable = {
        name: value.requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    model.eval()
    with torch.no_grad():
        seen = detached(tensors_of(model(**inputs)), "eval")
    model.train()
    output = model(**inputs)
    seen |= detached(tensors_of(output), "train")
    loss = loss_of(case, output)
    loss.backward()
    seen |= detached({"loss": loss}, "train")
    seen |= detached({name: value.grad for name, value in differentiable.items()}, "gradient of")
    seen |= detached(gradients_of(model), "gradient")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    seen |= detached(tensors_of({"norm": norm}), "train")
    return seen | detached(gradients_of(model), "clipped")


def three_steps(case: Case, optimizer_name: str, parallel: bool) -> Tensors:
    """The weights after three clipped steps of a stock optimizer, and the losses on the way."""
    model, inputs = perturbed(case, parallel=parallel), batch(case)
    cls, options = OPTIMIZERS[optimizer_name]
    optimizer = cls(model.parameters(), **options)
    seen: Tensors = {}
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(case, model(**inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        seen |= detached({str(step): loss}, "loss")
    return seen | detached(weights_of(model), "weight")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("head", HEADS)
def test_one_pass_equals_one_process(ranks, head, size):
    """Outputs, loss and all gradients, clipped or not, equal one process, for every head class."""
    case = Case(head, labels=head != "GPT2LMHeadModel")
    results = ranks(size).run(forward_and_backward, case, True)
    require_equal_ranks(results)
    require_close(results[0], forward_and_backward(case, False), 1e-10)


@pytest.mark.parametrize("size", [2, 4])
def test_the_sharded_loss_equals_one_process(ranks, size):
    """With labels, where Transformers computes the causal loss in float32, all agrees to 1e-6."""
    results = ranks(size).run(forward_and_backward, Case(), True)
    require_equal_ranks(results)
    require_close(results[0], forward_and_backward(Case(), False), 1e-6)


def _ones(*zeros: tuple[int, slice]) -> torch.Tensor:
    mask = torch.ones(3, 11, dtype=torch.int64)
    for row, columns in zeros:
        mask[row, columns] = 0
    return mask


def _labels(mask: torch.Tensor) -> torch.Tensor:
    return batch(Case())["input_ids"].masked_fill(mask == 0, -100)


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


RIGHT = _ones((0, slice(7, None)), (2, slice(4, None)))
LEFT = _ones((0, slice(0, 3)), (1, slice(0, 6)))
ENCODER = {
    "encoder_hidden_states": _floats(3, 6, 40),
    "encoder_attention_mask": _ones((1, slice(4, 6)))[:, :6],
}
CROSS = {"add_cross_attention": True}
EAGER = {"attn_implementation": "eager"}
SEEN = {"output_attentions": True, "output_hidden_states": True}
PLAIN = Case(labels=False)
CASES = {
    "right padding": PLAIN.but(inputs={"attention_mask": RIGHT}),
    "left padding": PLAIN.but(inputs={"attention_mask": LEFT}),
    "left padding, eager": PLAIN.but(config=EAGER, inputs={"attention_mask": LEFT}),
    "everything seen": PLAIN.but(config=EAGER, inputs=SEEN),
    "everything seen, base": Case("GPT2Model", EAGER, SEEN),
    "everything seen, by config": PLAIN.but(config={**EAGER, **SEEN}),
    "hidden states, sdpa": PLAIN.but(inputs={"output_hidden_states": True}),
    "cross-attention": PLAIN.but(config=CROSS, inputs=ENCODER),
    "cross-attention seen": PLAIN.but(config={**CROSS, **EAGER}, inputs={**ENCODER, **SEEN}),
    "cross-attention unused": PLAIN.but(config=CROSS),
    "scaled by layer": PLAIN.but(config={"scale_attn_by_inverse_layer_idx": True}),
    "unscaled": PLAIN.but(config={"scale_attn_weights": False}),
    "untied": PLAIN.but(config={"tie_word_embeddings": False}),
    "checkpointing": PLAIN.but(checkpointing=True),
    "token types": PLAIN.but(inputs={"token_type_ids": 90 + _ones((0, slice(0, 5)))}),
    "position ids": PLAIN.but(inputs={"position_ids": torch.arange(20, 31).expand(3, 11)}),
    "embeddings given": PLAIN.but(inputs={"input_ids": None, "inputs_embeds": _floats(3, 11, 40)}),
    "last logits only": PLAIN.but(inputs={"logits_to_keep": 4}),
    "three labels": Case("GPT2ForSequenceClassification", {"num_labels": 3}),
    "one head": PLAIN.but(config={"n_head": 1}),
    "eight heads": PLAIN.but(config={"n_head": 8, "n_inner": None, "vocab_size": 100}),
}
#: Transformers computes a part in float32 here.
CASES_IN_FLOAT32 = {
    "ignored labels": Case(inputs={"attention_mask": RIGHT, "labels": _labels(RIGHT)}),
    "no label counts": Case(inputs={"labels": _labels(RIGHT * 0), "num_items_in_batch": 1}),
    "accumulated": Case(inputs={"num_items_in_batch": torch.tensor(47)}),
    "accumulated, plain number": Case(inputs={"num_items_in_batch": 47}),
    "tuple": Case(inputs={"return_dict": False}),
    "tuple, by config": Case("GPT2Model", config={"return_dict": False}),
    "tuple, everything seen": Case(config=EAGER, inputs={"return_dict": False, **SEEN}),
    "upcast attention": Case(
        config={"reorder_and_upcast_attn": True, **EAGER}, dtype=torch.float32
    ),
    "untied, labels": Case(config={"tie_word_embeddings": False}),
    "checkpointing, labels": Case(checkpointing=True),
    "double heads, everything seen": Case("GPT2DoubleHeadsModel", EAGER, SEEN),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*CASES, *CASES_IN_FLOAT32])
def test_every_option_equals_one_process(ranks, name, size):
    """Masks, flags, caches, ties and options of the config change nothing about parity."""
    case = {**CASES, **CASES_IN_FLOAT32}[name]
    results = ranks(size).run(forward_and_backward, case, True)
    require_equal_ranks(results)
    in_float32 = 1e-6 if case.dtype is torch.float64 else 5e-6
    tolerance = 1e-10 if name in CASES else in_float32
    require_close(results[0], forward_and_backward(case, False), tolerance)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("labels", "tolerance"), [(False, 1e-10), (True, 1e-6)])
def test_three_steps_equal_one_process(ranks, optimizer, labels, tolerance, size):
    """Losses and weights after three clipped steps of stock optimizers equal one process."""
    case = Case(labels=labels)
    results = ranks(size).run(three_steps, case, optimizer, True)
    require_equal_ranks(results)
    require_close(results[0], three_steps(case, optimizer, False), tolerance)
