"""Optimizers that look at whole weights, Adafactor and Muon: torch's and Transformers' own classes.

Each step is one process's, whatever the degree, and so is what the optimizer remembers.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

import tensorpar
from tensorpar.gathering import whole
from tests.conformance.families import BEHIND_FLOAT32, CASES, EXACT, build, inputs
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)
from tests.conformance.training import announced, arguments, facts, make


def groups(model: Any) -> list[dict[str, Any]]:
    """Weights decay, biases do not."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if "bias" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "bias" in name]},
    ]


# a large eps: the bias of a key has no gradient but rounding, and would step by its sign
def by_torch(model: Any) -> torch.optim.Optimizer:
    """torch's Adafactor."""
    return torch.optim.Adafactor(groups(model), lr=0.05, eps=(1e-5, 1e-3))


def by_transformers(model: Any) -> torch.optim.Optimizer:
    """Transformers' Adafactor, with momentum for what decays."""
    (weights, biases), options = groups(model), {"eps": (1e-8, 1e-3), "relative_step": False}
    chosen = [{**weights, "beta1": 0.9}, biases]
    return transformers.optimization.Adafactor(chosen, lr=0.05, **options)


def muon(model: Any) -> torch.optim.Optimizer:
    """torch's Muon, of the matrices that have two dims in tensorpar's layout as well."""
    matrices = [p for name, p in model.named_parameters() if "mlp" in name and "weight" in name]
    return torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1)


WAYS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch": by_torch,
    "Transformers": by_transformers,
    "Muon": muon,
}


class Run:
    """A model that trains: one norm is frozen, the rate falls, gradients are clipped by a hook."""

    def __init__(self, family: str, way: str, *, parallel: bool, kind: Any = None) -> None:
        self.head = CASES[family].model
        self.model = build(family, self.head, parallel=parallel).train()
        named = self.model.named_parameters()
        next(p for name, p in named if "norm" in name.lower() or "ln" in name).requires_grad_(False)
        if kind is not None:  # its ranks are fed alike, so it changes nothing
            tensorpar.DistributedModel(self.model, data_parallel=kind)
        self.optimizer = WAYS[way](self.model)
        self.optimizer.register_step_pre_hook(self.clip)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.seen: Tensors = {}

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint is made of."""
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.schedule}

    def clip(self, *_: object) -> None:
        """What may be done between backward and a step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)

    @torch.enable_grad()
    def loss(self) -> torch.Tensor:
        """A closure."""
        self.optimizer.zero_grad()
        loss = self.model(**inputs(self.head, labels=True)).loss
        loss.backward()
        return loss.detach()

    def step(self, closure: bool = False) -> None:
        """One step of all."""
        if closure:
            loss = self.optimizer.step(self.loss)
        else:
            loss = self.loss()
            self.optimizer.step()
        self.schedule.step()
        self.seen[f"loss {self.schedule.last_epoch}"] = loss

    def facts(self) -> Tensors:
        """Losses, weights, and gradients that are still there."""
        held = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(held)
        self.seen["norm of gradients"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return detached(self.seen, "") | detached(weights_of(self.model), "weight")


def trained(family: str, way: str, parallel: bool) -> Tensors:
    """Three steps, the second with a closure."""
    run = Run(family, way, parallel=parallel)
    for number in range(3):
        run.step(closure=number == 1)
    return run.facts()


@pytest.mark.feature("Adafactor, whole weights gathered one at a time")
@pytest.mark.parametrize("family", sorted(CASES))
def test_steps_are_those_of_one_process(ranks, family):
    """Losses, gradients and weights, at a degree that divides nothing."""
    results = ranks(3).run(trained, family, "torch", True)
    require_equal_ranks(results)
    require_close(results[0], trained(family, "torch", False), BEHIND_FLOAT32)


@pytest.mark.parametrize(("way", "size"), [("Transformers", 2), ("Transformers", 4), ("Muon", 2)])
def test_other_optimizers(ranks, way, size):
    """At four ranks the last one has no head, and empty shards."""
    results = ranks(size).run(trained, "gpt2", way, True)
    require_equal_ranks(results)
    require_close(results[0], trained("gpt2", way, False), BEHIND_FLOAT32)


def remembered(way: str, parallel: bool) -> tuple[Tensors, set[str]]:
    """What an optimizer keeps of each weight after two steps; and which kinds are sharded."""
    run = Run("gpt2", way, parallel=parallel)
    run.step()
    run.step()
    found: Tensors = {}
    sharded: set[str] = set()
    for name, parameter in run.model.named_parameters():
        for kind, value in run.optimizer.state.get(parameter, {}).items():
            if isinstance(value, DTensor):
                sharded.add(kind)
                assert value.placements == parameter.placements
                value = value.full_tensor().norm()  # its axes are tensorpar's
            elif parallel is False and kind in ("exp_avg", "exp_avg_sq", "variance"):
                value = value.norm()
            found[f"{kind} of {name}"] = torch.as_tensor(value)
    return found, sharded


@pytest.mark.parametrize(
    ("way", "sharded"), [("torch", {"variance"}), ("Transformers", {"exp_avg", "exp_avg_sq"})]
)
def test_what_is_remembered(ranks, way, sharded):
    """It is one process's; what is as large as its weight is sharded as the weight is."""
    (found, kinds), (others, _) = ranks(2).run(remembered, way, True)
    assert kinds == sharded
    require_equal_ranks([found, others])
    require_close(found, remembered(way, False)[0], BEHIND_FLOAT32)


def checkpointed(folder: str, kind: Any) -> Tensors:
    """Two steps, a checkpoint, and one step more."""
    run = Run("gpt2", "Transformers", parallel=True, kind=kind)
    run.step()
    run.step()
    tensorpar.save_checkpoint(folder, 2, **run.parts)
    run.step()
    return run.facts()


def resumed(folder: str) -> Tensors:
    """The step after the checkpoint, by a run that has taken none before."""
    run = Run("gpt2", "Transformers", parallel=True)
    tensorpar.load_checkpoint(folder, **run.parts)
    run.step()
    return run.facts()


@pytest.mark.parametrize(
    ("size", "kind", "degree", "tolerance"),
    [(2, None, 2, 0.0), (2, None, 1, BEHIND_FLOAT32), (4, "fsdp", 2, BEHIND_FLOAT32)],
)
def test_resuming(ranks, tmp_path, size, kind, degree, tolerance):
    """At the same degree bit for bit; at another, and from data parallelism, the same."""
    pool = ranks(size, tensor_parallel_degree=2)
    undisturbed = pool.run(checkpointed, str(tmp_path), kind)
    again = ranks(degree).run(resumed, str(tmp_path))
    for ours, reference in zip(again, undisturbed, strict=False):
        require_close(ours, {name: reference[name] for name in ours}, tolerance)


def unlike() -> str:
    """A step at which one rank's weight has no gradient."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True)
    model(**inputs("GPT2LMHeadModel", labels=True)).loss.backward()
    if tensorpar.tp_rank() == 1:
        model.transformer.h[1].mlp.c_fc.weight.grad = None
    return refusal(by_torch(model).step)


def test_ranks_that_would_step_other_weights(ranks):
    """They are told, and nobody waits."""
    for told in ranks(2).run(unlike):
        assert "the ranks' Adafactor would step different parameters" in told
        assert (
            "transformer.h.1.mlp.c_fc.weight = a gradient and states [] on rank 0, absent" in told
        )


def others() -> tuple[str, bool, int]:
    """What is said to parameters of no model; whether a copy steps; how many weights are whole."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True)
    twin = copy.deepcopy(model)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def counted(tensor: Any, layout: Any) -> torch.Tensor:
        nonlocal most
        alive.add(full := whole(tensor, layout))
        most = max(most, len(alive))
        return full

    for one in (model, twin):
        one(**inputs("GPT2LMHeadModel", labels=True)).loss.backward()
        with mock.patch.object(tensorpar.whole_weights, "whole", counted):
            by_torch(one).step()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    same = all(torch.equal(x.to_local(), y.to_local()) for x, y in pairs)
    unknown = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    unknown.grad = unknown.detach().clone()
    held = [*model.parameters(), unknown]
    return refusal(torch.optim.Adafactor(held).step), same, most


def test_copies_and_parameters_of_no_model(ranks):
    """A copy has its layouts; what has none is refused; one weight and its gradient are whole."""
    for told, same, most in ranks(2).run(others):
        assert "Adafactor steps 1 DTensors of no parallel model that has run" in told
        assert "(97, 40)" in told.replace("[", "(").replace("]", ")")
        assert same
        assert most == 2


def by_trainer(folder: str, parallel: bool) -> Tensors:
    """A run of `Trainer`, to the end."""
    trainer: type = transformers.Trainer
    if parallel:
        from tensorpar.trainer import Trainer

        trainer = Trainer
    with announced() if parallel else nullcontext(), default_dtype(torch.float64):
        args = arguments(folder, optim="adafactor", num_train_epochs=1)
        run = make(trainer, "bert", "BertForSequenceClassification", args)
        run.train()
        # the bias of a key has no gradient but rounding, by whose sign it steps
        return {name: x for name, x in facts(run).items() if "key.bias" not in name}


def test_trainer(ranks, tmp_path):
    """`optim="adafactor"`."""
    results = ranks(2).run(by_trainer, str(tmp_path / "ranks"), True)
    require_equal_ranks(results)
    require_close(results[0], by_trainer(str(tmp_path / "one"), False), EXACT)
