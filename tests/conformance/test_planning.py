"""A plan says of each family what a real step of a real model on real ranks then does."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tensorpar
from tensorpar.planning.step import Figures, batch, built, optimizer_of, planned, watched
from tensorpar.planning.wanted import Wanted
from tests.conformance.families import CASES, CAUSAL, tiny_config
from tests.conformance.test_communication import MASKED

#: the family, and whether ranks that share a model split the sequence too.
DATA_PARALLEL = {
    "fsdp": [("gpt2", False), ("gptj", True)],
    "replicate": [("bert", False), ("gpt2", True)],
}


def wanted(family: str, **changes: Any) -> Wanted:
    """A step of a tiny model, of float64 and with what does not divide."""
    head = MASKED.get(family, CAUSAL[family])
    return Wanted(
        tiny_config(family, layers=2),
        head,
        batch=3,
        sequence=9,
        **{"dtype": torch.float64, **changes},
    )


def really(job: Wanted) -> Figures:
    """The same step, done."""
    with tensorpar.tensor_parallelism(sequence_parallel=job.sequence_parallel):
        model = built(job)
    if job.dp > 1:
        model = tensorpar.DistributedModel(model, data_parallel=job.data_parallel)
    given = batch(job)
    with Settled():
        return watched(model, optimizer_of(job, model), given, lambda: model(**given))


class Settled(TorchDispatchMode):
    """Before each operation, waits until this process's other threads have nothing to do.

    gloo's let go of what they have sent at some moment after a collective's end: where ranks wait
    for a core, late enough for a tensor to be held at the peak that nobody needs any more.
    """

    def __init__(self) -> None:
        super().__init__()
        threads = Path("/proc/self/task").iterdir()
        self._others = [x / "stat" for x in threads if int(x.name) != threading.get_native_id()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        deadline = time.monotonic() + 1
        while any(map(is_running, self._others)) and time.monotonic() < deadline:
            time.sleep(0)
        return func(*args, **(kwargs or {}))


def is_running(stat: Path) -> bool:
    """Whether a thread, as Linux tells of it, runs or waits for a core."""
    return stat.read_text().rpartition(")")[2].split()[0] == "R"


def require_peak(plan: Figures, real: list[Figures]) -> None:
    """That of the rank that has most; gloo sums a reduce-scatter in a copy beyond the plan."""
    most = max(one.peak for one in real)
    assert -64 <= most - plan.peak <= 0.005 * most


def require_planned(plan: Figures, real: list[Figures]) -> None:
    """Figure by figure the plan is the rank that has most; the peak apart."""
    names = ("num_parameters", "parameters", "gradients", "optimizer", "activations", "flop")
    most = {name: max(getattr(one, name) for one in real) for name in names}
    assert {name: getattr(plan, name) for name in names} == most
    assert plan.sent.keys() == real[0].sent.keys()
    for kind, sent in plan.sent.items():
        assert {one.sent[kind].num_calls for one in real} == {sent.num_calls}
        assert max(one.sent[kind].num_bytes for one in real) == sent.num_bytes


@pytest.mark.feature("tensorpar plan: what is predicted is what happens")
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_plan_is_what_happens(ranks, family):
    """Parameters, gradients, moments, activations, operations, collectives: to the byte."""
    for size in (2, 3) if family == "gpt2" else (2,):
        job = wanted(family, tp=size)
        plan, real = planned(job), ranks(size).run(really, job)
        require_planned(plan, real)
        require_peak(plan, real)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_plan_of_recomputed_activations(ranks, family):
    """Gradient checkpointing, which turns caches off: of a family without a mask, and with one."""
    job = wanted(family, tp=2, gradient_checkpointing=True, optimizer="sgd")
    plan, real = planned(job), ranks(2).run(really, job)
    require_planned(plan, real)
    require_peak(plan, real)


@pytest.mark.feature("tensorpar plan with sequence parallelism")
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_plan_of_a_split_sequence(ranks, family):
    """Nine positions over two ranks and, where blocks are recomputed, over four."""
    jobs = [wanted(family, tp=2, sequence_parallel=True)]
    if family == "gpt2":
        jobs.append(replace(jobs[0], tp=4, gradient_checkpointing=True))
    for job in jobs:
        plan, real = planned(job), ranks(job.tp).run(really, job)
        require_planned(plan, real)
        require_peak(plan, real)


@pytest.mark.parametrize("kind", sorted(DATA_PARALLEL))
def test_a_plan_of_data_parallel_copies(ranks, kind):
    """Two copies of two ranks, each with the sequence whole or split between them."""
    for family, split in DATA_PARALLEL[kind]:
        job = wanted(family, tp=2, dp=2, data_parallel=kind, sequence_parallel=split)
        plan, real = planned(job), ranks(4, tensor_parallel_degree=2).run(really, job)
        require_planned(plan, real)
        require_peak(plan, real)
