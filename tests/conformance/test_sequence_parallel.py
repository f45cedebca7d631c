"""`sequence_parallel=True`: ranks keep rows of the sequence, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    EXACT,
    build,
    inputs,
    probe,
)
from tests.conformance.gpt2 import (
    Tensors,
    checkpoint_activations,
    detached,
    gradients_of,
    require_close,
    require_equal_ranks,
    tensors_of,
    weights_of,
)

SPLIT = {"sequence_parallel": True, "fused_attention": False}
#: beside the family's language model: a head on the last or the first position, and none.
HEADS = {"gpt2": "GPT2DoubleHeadsModel", "bert": "BertForPreTraining"}


def trained(family: str, parallel: bool, reentrant: bool | None = None) -> Tensors:
    """A training step of every head: outputs, hidden states, gradients; loss and weights after."""
    case, found = CASES[family], {}
    for head in dict.fromkeys((case.model, HEADS.get(family, case.heads[-1]))):
        model = build(family, head, parallel=parallel, **(SPLIT if parallel else {})).train()
        if reentrant is not None:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = inputs(head, labels=False)
        output = model(**given, output_hidden_states=True)
        probe(output, given["attention_mask"]).backward()
        found |= detached(tensors_of(output), f"{head}/output")
        found |= detached(gradients_of(model), f"{head}/gradient")
        optimizer.step()
        loss = model(**inputs(head, labels=True)).loss
        found |= {f"{head}/loss": loss.detach().double()}
        found |= detached(weights_of(model), f"{head}/weight")
    return found


def require_alike(ours: Tensors, reference: Tensors) -> None:
    """Equal in float64; Transformers computes some losses in float32."""
    losses = {name for name in reference if name.endswith("/loss")}
    for names, tolerance in ((losses, BEHIND_FLOAT32), (reference.keys() - losses, EXACT)):
        require_close(
            {name: x for name, x in ours.items() if (name in losses) == (names is losses)},
            {name: reference[name] for name in names},
            tolerance,
        )


@pytest.mark.feature("sequence parallelism")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_training_step_of_one_process(ranks, family, size):
    """Nine positions over 2 and 4 ranks, one of them with none: all is as in one process."""
    results = ranks(size).run(trained, family, True)
    require_equal_ranks(results)
    require_alike(results[0], trained(family, False))
