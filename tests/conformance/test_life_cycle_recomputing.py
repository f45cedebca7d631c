"""Gradient checkpointing: layers computed again in backward compute what they did before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.conformance.families import BEHIND_FLOAT32, CASES, EXACT, IN_FLOAT32, build, inputs
from tests.conformance.gpt2 import (
    Tensors,
    checkpoint_activations,
    detached,
    gradients_of,
    require_close,
    require_equal_ranks,
)


def checkpointed(family: str, attentions: bool) -> list[Tensors]:
    """Loss and gradients with dropout on: plainly, then recomputed, reentrantly and not.

    Args:
        family: a key of `CASES`.
        attentions: return attention weights too, and train on them.
    """
    model = build(family, CASES[family].model, parallel=True).train()
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.2
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                vars(module)[name] = 0.2
    found = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(5)
        given = inputs(CASES[family].model, labels=True)
        output = model(**given, output_attentions=attentions)
        recorded = [weights.square().mean() for weights in output.attentions or ()]
        assert len(recorded) == 2 * attentions
        (output.loss + sum(recorded)).backward()
        found.append(
            {"loss": output.loss.detach().double(), "random": torch.rand(2)}
            | detached(gradients_of(model), "gradient")
        )
    return found


def require_recomputed(results: list[list[Tensors]], tolerance: float) -> None:
    """The three ways agree with each other, and so do the ranks."""
    for plainly, *recomputed in results:
        for other in recomputed:
            require_close(other, plainly, tolerance)
    for same in zip(*results, strict=True):
        require_equal_ranks(list(same))


@pytest.mark.feature("gradient checkpointing")
@pytest.mark.parametrize("family", sorted(CASES))
def test_recomputed_activations(ranks, family):
    """Gradients with dropout on are those without recomputation, reentrant or not."""
    tolerance = BEHIND_FLOAT32 if family in IN_FLOAT32 else EXACT
    require_recomputed(ranks(2).run(checkpointed, family, False), tolerance)


@pytest.mark.feature("gradient checkpointing with output_attentions")
@pytest.mark.parametrize("family", ["gptj", "gptneo"])
def test_recomputed_attention_weights(ranks, family):
    """Attention that is fused elsewhere is recomputed as it was computed: in the open.

    For the other families Transformers records weights from outside the layer, so that reentrant
    checkpointing cuts them off, and eager attention has to be asked for: nothing of it is ours.
    """
    require_recomputed(ranks(2).run(checkpointed, family, True), BEHIND_FLOAT32)
