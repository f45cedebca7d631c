"""Every model class of every family computes on several ranks what it computes in one process."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.tensor.debug import CommDebugMode

import tensorpar
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    gradients_of,
    require_close,
    require_equal_ranks,
    tensors_of,
    weights_of,
)
from tests.families import FAMILIES, PLANS_ONLY

EXACT, BEHIND_FLOAT32 = 1e-10, 1e-6
#: families whose attention Transformers computes in float32 whatever the model's dtype.
IN_FLOAT32 = {"gptj", "gptneo"}
CASES = {case.name: case for case in (*FAMILIES, *PLANS_ONLY)}
HEADS = [(case.name, head) for case in CASES.values() for head in (case.model, *case.heads)]


def build(family: str, head: str, *, parallel: bool, **options: Any) -> Any:
    """A perturbed float64 model without dropout; the parallel one is cut from the same values."""
    torch.manual_seed(0)
    config = CASES[family].config()
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    config.pad_token_id = 1
    with default_dtype(torch.float64):
        model = getattr(transformers, head)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.1)
    if parallel:
        chosen = tensorpar.options.Options.of(True, options)
        tensorpar.parallelize(model, options=chosen)
    return model


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


def probe(output: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor:
    """A scalar that every output moves; nothing of a padded position enters."""
    total = torch.zeros((), dtype=torch.float64)
    for value in tensors_of(output).values():
        kept = value
        if value.shape[: mask.ndim] == mask.shape:
            kept = value * mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim))
        total = total + (kept * torch.linspace(-1, 1, value.numel()).view_as(value)).sum()
    return total


def outputs_and_gradients(
    family: str, head: str, parallel: bool, options: Mapping[str, Any]
) -> Tensors:
    """Outputs in eval, then the gradients of a float64 scalar made of all outputs in training."""
    model = build(family, head, parallel=parallel, **options)
    given = inputs(head, labels=False)
    mask = given["attention_mask"]
    with torch.no_grad():
        seen = tensors_of(model.eval()(**given, output_hidden_states=True))
    kept = {
        name: value * mask.view(*mask.shape, *[1] * (value.ndim - mask.ndim))
        if value.shape[: mask.ndim] == mask.shape
        else value
        for name, value in seen.items()
    }
    probe(model.train()(**given), mask).backward()
    return detached(kept, "output") | detached(gradients_of(model), "gradient")


def trained_with_labels(family: str, head: str, parallel: bool) -> Tensors:
    """The model's own loss and the weights after three clipped steps."""
    model = build(family, head, parallel=parallel).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**inputs(head, labels=True)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return {"losses": torch.stack(losses)} | detached(weights_of(model), "weight")


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


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_law_parity_of_every_class(ranks, family, head, size):
    """Outputs, hidden states and every gradient equal one process's in float64."""
    options = {"fused_attention": False}
    results = ranks(size).run(outputs_and_gradients, family, head, True, options)
    require_equal_ranks(results)
    require_close(results[0], outputs_and_gradients(family, head, False, {}), EXACT)


@pytest.mark.parametrize("family", sorted(IN_FLOAT32))
def test_fused_attention_computes_the_same(ranks, family):
    """The fused kernel agrees with Transformers' float32 scores, local windows included."""
    case = CASES[family]
    results = ranks(2).run(outputs_and_gradients, family, case.model, True, {})
    require_equal_ranks(results)
    reference = outputs_and_gradients(family, case.model, False, {})
    assert not torch.equal(results[0]["output/logits"], reference["output/logits"])
    scale = max(x.abs().max().item() for x in reference.values())
    require_close(results[0], reference, BEHIND_FLOAT32 * scale)


@pytest.mark.parametrize(
    ("family", "head"), [pair for pair in HEADS if "Model" not in pair[1][-5:]]
)
def test_training_with_labels(ranks, family, head):
    """Losses and the weights after three clipped steps equal one process's."""
    results = ranks(2).run(trained_with_labels, family, head, True)
    require_equal_ranks(results)
    require_close(results[0], trained_with_labels(family, head, False), BEHIND_FLOAT32)


def count_collectives(family: str, head: str) -> tuple[int, int, int]:
    """All-reduces of a training forward without labels, of its backward, and layers."""
    model = build(family, head, parallel=True, check_batches=False).train()
    given = inputs(head, labels=False)
    with CommDebugMode() as mode:
        output = model(**given)
        forward = sum(mode.get_comm_counts().values())
        output[0].sum().backward()
        total = sum(mode.get_comm_counts().values())
    return forward, total - forward, copy.copy(model.config.num_hidden_layers)


@pytest.mark.parametrize("family", sorted(CASES))
def test_collectives_a_layer(ranks, family):
    """Two all-reduces a layer each way, one for GPT-J, and one for the embedding."""
    per_layer = 1 if family == "gptj" else 2
    base = CASES[family].heads[0]
    for forward, backward, layers in ranks(2).run(count_collectives, family, base):
        assert forward == 1 + per_layer * layers
        assert backward == per_layer * layers


def attentions(family: str, parallel: bool) -> list[torch.Tensor]:
    """Recorded attention weights of every layer."""
    model = build(family, CASES[family].heads[0], parallel=parallel).eval()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return list(model(**inputs("", labels=False), output_attentions=True).attentions)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(CASES))
def test_attentions_have_all_heads_in_order(ranks, family, size):
    """`output_attentions` returns what one process returns, an idle rank included."""
    reference = attentions(family, False)
    for result in ranks(size).run(attentions, family, True):
        assert len(result) == len(reference) > 0
        for ours, theirs in zip(result, reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


def generated(family: str, parallel: bool) -> torch.Tensor:
    """Greedy tokens of a left-padded batch."""
    case = CASES[family]
    head = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}.get(family, case.model)
    model = build(family, head, parallel=parallel).eval()
    model.config.is_decoder = True
    given = inputs(head, labels=False)
    given = {name: value.flip(-1) for name, value in given.items()}
    return model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=1)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gptneo", "gptneox"])
def test_generation_from_left_padded_prompts(ranks, family):
    """Greedy decoding with a cache picks the tokens of one process."""
    reference = generated(family, False)
    for tokens in ranks(2).run(generated, family, True):
        assert torch.equal(tokens, reference)


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
