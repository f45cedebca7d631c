"""Perturbed float64 models of every family and class, and what is compared of them.

The same functions run in one process on Transformers' own model and on every rank on the parallel
one. The sizes of `tests.configs` divide by no world size; at four ranks the last one has no head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

import tensorpar
from tests.conformance.gpt2 import Tensors, default_dtype, detached, gradients_of, tensors_of
from tests.families import FAMILIES, PLANS_ONLY

EXACT, BEHIND_FLOAT32 = 1e-10, 1e-6
#: families whose attention Transformers computes in float32 whatever the model's dtype.
IN_FLOAT32 = {"gptj", "gptneo"}
CASES = {case.name: case for case in (*FAMILIES, *PLANS_ONLY)}
HEADS = [(case.name, head) for case in CASES.values() for head in (case.model, *case.heads)]
#: the class with a causal language-modelling head.
CAUSAL = {name: case.model for name, case in CASES.items()} | {
    "bert": "BertLMHeadModel",
    "roberta": "RobertaForCausalLM",
}
#: what makes a family's model attend to earlier tokens only.
AS_DECODER = {"bert": {"is_decoder": True}, "roberta": {"is_decoder": True}}
PAD = 1


def tiny_config(family: str, **changes: Any) -> Any:
    """The family's tiny config without dropout."""
    config = CASES[family].config(**changes)
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    config.pad_token_id = PAD
    return config


def perturb(model: torch.nn.Module) -> None:
    """Move every parameter from its initial value, zeros and ones included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=0.1)


def build(
    family: str,
    head: str,
    *,
    parallel: bool,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Any:
    """A perturbed model without dropout; the parallel one is cut from the same values.

    Args:
        family: a key of `CASES`.
        head: the name of a Transformers class.
        parallel: whether to make it tensor parallel.
        config: changes of the tiny config.
        dtype: of the parameters; values are drawn in float64.
        options: fields of `Options`.
    """
    torch.manual_seed(0)
    chosen = tiny_config(family, **(config or {}))
    with default_dtype(torch.float64):
        model = getattr(transformers, head)(chosen)
    perturb(model)
    if dtype != torch.float64:
        model = model.to(dtype)
    if parallel:
        tensorpar.parallelize(model, options=tensorpar.options.Options.of(True, options))
    return model


def build_causal(family: str, *, parallel: bool, **changes: Any) -> Any:
    """The family's causal language model; BERT and RoBERTa as decoders."""
    config = {**AS_DECODER.get(family, {}), **changes.pop("config", {})}
    return build(family, CAUSAL[family], parallel=parallel, config=config, **changes)


def inputs(head: str, *, labels: bool) -> dict[str, torch.Tensor]:
    """Forward arguments of a class, with right padding; what its loss needs on request."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int, low: int = 2, high: int = 97) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    choices = (2,) if "MultipleChoice" in head or "Double" in head else ()
    ids = draw(3, *choices, 9)
    mask = torch.ones_like(ids)
    mask[1, ..., 6:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if not labels:
        return given
    targets = ids.masked_fill(mask == 0, -100)
    by_kind = {
        "LM": {"labels": targets},
        "PreTraining": {"labels": targets, "next_sentence_label": draw(3, low=0, high=2)},
        "Double": {"labels": targets, "mc_labels": draw(3, low=0, high=2)},
        "TokenClassification": {"labels": draw(3, 9, low=0, high=2)},
        "QuestionAnswering": {
            "start_positions": draw(3, low=0, high=6),
            "end_positions": draw(3, low=0, high=6),
        },
        "": {"labels": draw(3, low=0, high=2)},
    }
    return given | next(extra for kind, extra in by_kind.items() if kind in head)


def without_padding(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zeros where a position is padding, for values `[*mask.shape, ...]`; others as they are."""
    if value.shape[: mask.ndim] != mask.shape:
        return value
    return value * mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim))


def probe(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """A scalar that every output moves; nothing of a padded position enters."""
    total = torch.zeros((), dtype=torch.float64)
    for value in tensors_of(output).values():
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value)
        total = total + (without_padding(value, mask) * weights).sum()
    return total


def outputs_and_gradients(
    family: str, head: str, parallel: bool, options: Mapping[str, Any]
) -> Tensors:
    """Outputs in eval, then the gradients of a float64 scalar made of all outputs in training."""
    model = build(family, head, parallel=parallel, **options)
    given = inputs(head, labels=False)
    return compared(model, {**given, "output_hidden_states": True}, given["attention_mask"])


def compared(model: Any, given: Mapping[str, Any], mask: torch.Tensor | None = None) -> Tensors:
    """What a model makes of its arguments, whole: all that must equal one process's.

    Args:
        model: on Transformers' own classes or parallel.
        given: forward arguments; floating ones that require a gradient get theirs compared.
        mask: `[batch, sequence]`, zero for positions whose values mean nothing.

    Returns:
        Outputs in eval, and gradients of a scalar made of all outputs in training.
    """
    mask = torch.ones(0) if mask is None else mask
    with torch.no_grad():
        seen = tensors_of(model.eval()(**given))
    kept = {name: without_padding(value, mask) for name, value in seen.items()}
    probe(model.train()(**given), mask).backward()
    wanted = {
        name: value.grad
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.requires_grad
    }
    found = detached(kept, "output") | detached(gradients_of(model), "gradient")
    return found | detached(wanted, "gradient of")
