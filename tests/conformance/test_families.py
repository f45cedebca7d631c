"""Every model class of every family computes on several ranks what it computes in one process."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from torch.distributed.tensor.debug import CommDebugMode

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
)
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    require_close,
    require_equal_ranks,
    weights_of,
)


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
