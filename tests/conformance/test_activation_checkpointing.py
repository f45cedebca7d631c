"""Activations that are computed again in backward, with dropout on: every mask comes out again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    _CHECKPOINT_PREFIX,
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import tensorpar
from tensorpar.parameters import local
from tests.conformance.families import CASES, build, inputs
from tests.conformance.gpt2 import Tensors, require_equal_ranks


def with_dropout(family: str, implementation: str) -> Any:
    """A parallel model that drops one in five, of attention weights and of everything else."""
    model = build(family, CASES[family].model, parallel=True).train()
    model.set_attn_implementation(implementation)
    # recomputed blocks would fill a cache twice, and keys lie in memory otherwise than without one
    model.config.use_cache = False
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.2
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                vars(module)[name] = 0.2
    return model


def by_transformers(model: Any, reentrant: bool) -> None:
    """The switch that the Trainer uses too."""
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def by_torch(model: Any, reentrant: bool) -> None:
    """Block by block, with torch's wrapper."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks = list(next(lists))
    apply_activation_checkpointing(
        model,
        partial(
            checkpoint_wrapper,
            checkpoint_impl=CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT,
        ),
        check_fn=lambda module: any(module is block for block in blocks),
    )


WAYS: tuple[Callable[[Any, bool], None], ...] = (by_transformers, by_torch)


def step(model: Any, family: str, seed: int) -> Tensors:
    """Loss, this rank's gradients, and what the generator gives after them."""
    torch.manual_seed(seed)
    loss = model(**inputs(CASES[family].model, labels=True)).loss
    loss.backward()
    found = {"loss": loss.detach(), "random": torch.rand(2)}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name.replace(_CHECKPOINT_PREFIX, "")] = local(parameter.grad).clone()
    return found


def checkpointed(family: str, implementation: str) -> tuple[Tensors, Tensors, list[Tensors]]:
    """Steps without recomputation, from two seeds, and from the first one with, in every way."""
    plain, other = (step(with_dropout(family, implementation), family, seed) for seed in (5, 6))
    recomputed = []
    for switch_on in WAYS:
        for reentrant in (False, True):
            model = with_dropout(family, implementation)
            switch_on(model, reentrant)
            blocks = count_forwards(model)
            recomputed.append(step(model, family, 5))
            # torch stops a recomputation when it has all it needs, before a last norm perhaps
            assert max(blocks.values()) == 2, "nothing was recomputed"
    return plain, other, recomputed


def count_forwards(model: Any) -> dict[int, int]:
    """How often each layer norm ran, of those inside blocks."""
    counts: dict[int, int] = {}

    def ran(module: nn.Module, *_: Any) -> None:
        counts[id(module)] = counts.get(id(module), 0) + 1

    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    for module in next(lists).modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(ran)
    return counts


@pytest.mark.feature("activation checkpointing, dropout on")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "size"),
    [*((family, 2) for family in sorted(CASES)), ("gpt2", 4)],  # at four the last has no head
)
def test_recomputed_activations(ranks, family, size, implementation):
    """Gradients are bit for bit those without recomputation, by Transformers' switch or torch's."""
    results = ranks(size).run(checkpointed, family, implementation)
    for plain, other, recomputed in results:
        assert not torch.equal(plain["loss"], other["loss"]), "nothing was dropped"
        require_equal_ranks([plain, *recomputed])
    assert len({result[0]["loss"].item() for result in results}) == 1


def saved(folder: str) -> list[dict[str, Any]]:
    """What a model says of itself and of its optimizer after a step, without wrappers and with."""
    found = []
    for wrapped in (False, True):
        model = with_dropout("gpt2", "sdpa")
        if wrapped:
            by_torch(model, False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step(model, "gpt2", 5)
        optimizer.step()
        model.save_pretrained(f"{folder}/{wrapped}")
        file = load_file(f"{folder}/{wrapped}/model.safetensors")
        moments = tensorpar.optimizer_state_dict(model, optimizer)
        tensorpar.load_optimizer_state_dict(model, optimizer, moments)
        other = build("gpt2", "GPT2LMHeadModel", parallel=True, seed=1)
        if wrapped:
            by_torch(other, False)
        loaded = tensorpar.DistributedModel(other)
        loaded.load_state_dict(file)
        full = loaded.state_dict()
        states = {
            f"{place} {kind}": value
            for place, state in moments["state"].items()
            for kind, value in state.items()
        }
        found.append({"file": file, "moments": states, "loaded": full})
    return found


def test_wrapped_models_are_saved_as_if_they_were_not(ranks, tmp_path):
    """torch's wrapper is a part of paths, but of no name and no layout in what is saved."""
    for plain, wrapped in ranks(2).run(saved, str(tmp_path)):
        for kind in ("file", "moments", "loaded"):
            require_equal_ranks([plain[kind], wrapped[kind]])
