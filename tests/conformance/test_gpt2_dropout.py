"""Random numbers: common where activations are replicated, each rank's own within its heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from tensorpar.parameters import local, shard_dim
from tests.conformance.gpt2 import (
    DROPOUT,
    Case,
    Tensors,
    batch,
    detached,
    gradients_of,
    perturbed,
    require_equal_ranks,
)

EAGER = Case(config={**DROPOUT, "attn_implementation": "eager"})
SDPA = Case(config=DROPOUT)


def _record(model: nn.Module, common: Tensors, own: Tensors) -> None:
    """Note the outputs of replicated modules, and the attention weights of this rank's heads."""

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, GPT2Attention):
                common[path] = output[0].detach().clone()
                if output[1] is not None:
                    own[path] = output[1].detach().clone()
            else:
                common[path] = output.detach().clone()

        return hook

    for path, module in model.named_modules():
        replicated = path.endswith(
            ("ln_1", "ln_2", "ln_f", "wte", "wpe", "drop", "mlp", ".dropout")
        )
        if replicated or isinstance(module, GPT2Attention):
            module.register_forward_hook(note(path))


def one_step(case: Case, seed: int) -> tuple[Tensors, Tensors, Tensors]:
    """Replicated activations, own attention weights, and gradients of a training step."""
    model = perturbed(case, parallel=True)
    common: Tensors = {}
    own: Tensors = {}
    _record(model, common, own)
    torch.manual_seed(seed)
    model.train()(**batch(case)).loss.backward()
    common["next random number"] = torch.rand(1)
    return common, own, detached(gradients_of(model), "gradient")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", [EAGER, SDPA], ids=["eager", "sdpa"])
def test_replicated_activations_agree_under_dropout(ranks, case, size):
    """With dropout, activations between the doors are bit-identical on all ranks."""
    results = ranks(size).run(one_step, case, 11)
    require_equal_ranks([common for common, _, _ in results])
    require_equal_ranks([gradients for *_, gradients in results])
    assert len(results[0][0]) >= 2 * 5 + 4


@pytest.mark.parametrize("size", [2, 4])
def test_heads_drop_out_on_their_own(ranks, size):
    """No two ranks' heads, and no two layers, share a mask; each drops about p of the weights."""
    results = ranks(size).run(one_step, EAGER, 11)
    lower = torch.ones(11, 11).tril().bool()
    masks = [
        (weights[:, head][:, lower] == 0).flatten()
        for _, own, _ in results[: 3 if size == 4 else size]  # at four ranks the last is idle
        for weights in own.values()
        for head in range(weights.shape[1])
    ]
    assert len(masks) == 2 * 5
    for place, mask in enumerate(masks):
        assert mask.double().mean().item() == pytest.approx(0.3, abs=0.12)
        assert not any(torch.equal(mask, other) for other in masks[place + 1 :])


@pytest.mark.parametrize("case", [EAGER, SDPA], ids=["eager", "sdpa"])
def test_a_seed_governs_every_draw(ranks, case):
    """`torch.manual_seed` reproduces a step exactly; another seed does not."""
    first, again, other = (ranks(2).run(one_step, case, seed) for seed in (11, 11, 12))
    for rank in range(2):
        for kind in range(3):
            require_equal_ranks([first[rank][kind], again[rank][kind]])
    assert not torch.equal(first[0][0]["transformer.drop"], other[0][0]["transformer.drop"])


def clipped_steps(kind: str) -> tuple[Tensors, Tensors]:
    """Replicated parameters before and after four clipped steps with dropout."""
    model = perturbed(SDPA, parallel=True)
    replicated = {n: p for n, p in model.named_parameters() if shard_dim(p) is None}
    before = {name: local(p).detach().clone() for name, p in replicated.items()}
    optimizer = {
        "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    }[kind](model.parameters())
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        model(**batch(SDPA)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return before, {name: local(p).detach().clone() for name, p in replicated.items()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["adamw fused", "adamw foreach", "sgd", "adagrad"])
def test_replicas_stay_identical(ranks, kind, size):
    """Law replicas: replicated parameters are bit-identical after clipped steps with dropout."""
    results = ranks(size).run(clipped_steps, kind)
    require_equal_ranks([after for _, after in results])
    before, after = results[0]
    assert not [name for name, x in before.items() if torch.equal(x, after[name])]
