"""What a run of `train_gpt2.py` has measured; the table, the checks and the picture of three."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

FALL = 1.5  # nats by which the held-out loss must fall
EARLY_STEPS, EARLY_LIMIT = 20, 1e-5
LIMIT = 1e-2


@dataclass(frozen=True)
class Run:
    """One run of `train`.

    Attributes:
        name: also that of its folder.
        losses: of every step's batch, before its update.
        held_out: number of updates made to held-out loss.
        tokens_per_second: at the median step, evaluation apart.
        parameters: of each rank.
        memory_mb: of each rank, peak resident memory before the model was built and at the end.
        greedy: the tokens of the greedy continuation.
    """

    name: str
    losses: list[float]
    held_out: dict[int, float]
    tokens_per_second: float
    parameters: list[int]
    memory_mb: list[tuple[float, float]]
    greedy: list[int]

    def write(self, out: Path) -> None:
        (out / f"{self.name}.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, out: Path, name: str) -> Run:
        fields = json.loads((out / f"{name}.json").read_text())
        fields["held_out"] = {int(step): loss for step, loss in fields["held_out"].items()}
        return cls(**fields)


@dataclass(frozen=True)
class Drift:
    """How far two runs are apart: at every step's batch, and on the held-out text."""

    train: list[float]
    held_out: dict[int, float]

    @classmethod
    def between(cls, a: Run, b: Run) -> Drift:
        train = [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
        return cls(train, {step: abs(loss - b.held_out[step]) for step, loss in a.held_out.items()})

    def largest(self, first: int, last: int) -> float:
        """Over the steps from `first` to `last`, both losses; NaN if one of them is."""
        held_out = [x for step, x in self.held_out.items() if first <= step <= last]
        return float(torch.tensor(self.train[max(first - 1, 0) : last] + held_out).max())


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far (`ru_maxrss`): libraries, code and all."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def num_parameters(model: nn.Module) -> int:
    """How many this rank holds; in a parallel model every parameter is a DTensor."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.numel() for p in held)


def report(one: Run, half: Run, parallel: Run, out: Path) -> list[str]:
    """Print the table, draw the curves; return what is not as it must be."""
    drift, yardstick = Drift.between(one, parallel), Drift.between(one, half)
    print_losses(one, parallel, drift, yardstick)
    problems = print_differences(drift, yardstick, len(one.losses))
    print_resources([one, half, parallel])
    for run in (one, parallel):
        before, *_, after = run.held_out.values()
        fell = before - after
        print(f"Held-out loss of {run.name} fell by {fell:.3f} nats (required: {FALL})")
        if not fell >= FALL:
            problems.append(f"the held-out loss of {run.name} fell by {fell:.3f} nats only")
    draw(one, parallel, drift, yardstick, out / "loss.png")
    print(f"Loss curves: {out / 'loss.png'}")
    return problems


def print_losses(one: Run, parallel: Run, drift: Drift, yardstick: Drift) -> None:
    print("\nTrain loss: of that step's batch, before its update; held-out loss: after it")
    print(f"{'':>6}{'train loss':^34}{'held-out loss':^34}{'yardstick':>12}")
    columns = f"{'one process':>12}{parallel.name:>11}{'differ by':>11}"
    print(f"{'step':>6}{columns}{columns}{'train':>12}")
    for step in sorted({*one.held_out, 1, 5, 10} & {*range(len(one.losses) + 1)}):
        print(f"{step:>6}", end="")
        if step == 0:
            print(f"{'':>34}", end="")
        else:
            train = one.losses[step - 1], parallel.losses[step - 1], drift.train[step - 1]
            print(f"{train[0]:>12.6f}{train[1]:>11.6f}{train[2]:>11.1e}", end="")
        if step in one.held_out:
            held_out = one.held_out[step], parallel.held_out[step], drift.held_out[step]
            print(f"{held_out[0]:>12.6f}{held_out[1]:>11.6f}{held_out[2]:>11.1e}", end="")
        else:
            print(f"{'':>34}", end="")
        print(f"{yardstick.train[step - 1]:>12.1e}" if step else "")


def print_differences(drift: Drift, yardstick: Drift, num_steps: int) -> list[str]:
    """The largest differences beside their limits; which limits they break."""
    problems = []
    spans = {
        f"the first {EARLY_STEPS} steps": (0, EARLY_STEPS, EARLY_LIMIT),
        "all steps": (0, num_steps, LIMIT),
        "the last step": (num_steps, num_steps, LIMIT),
    }
    print("\nLargest difference, train and held-out; yardstick: one process, all and half threads")
    for span, (first, last, limit) in spans.items():
        largest = drift.largest(first, last)
        print(
            f"  over {span:<20}{largest:>9.1e}  limit {limit:.0e}"
            f"  yardstick {yardstick.largest(first, last):.1e}"
        )
        if not largest <= limit:
            problems.append(f"losses differ by {largest:.1e} over {span}, limit {limit:.0e}")
    return problems


def print_resources(runs: list[Run]) -> None:
    print("\nPeak memory: ru_maxrss in MB; most of it is Python, torch and Transformers themselves")
    print(f"{'run':>18}{'rank':>6}{'parameters':>12}{'peak':>8}{'since model':>13}{'tokens/s':>10}")
    for run in runs:
        for rank, (before, peak) in enumerate(run.memory_mb):
            speed = f"{run.tokens_per_second:>10,.0f}" if rank == 0 else ""
            print(
                f"{run.name:>18}{rank:>6}{run.parameters[rank]:>12,}{peak:>8,.0f}"
                f"{peak - before:>13,.0f}{speed}"
            )
    print("So small a model is bound by latency; benchmarks/bench_step.py times a larger one\n")


def draw(one: Run, parallel: Run, drift: Drift, yardstick: Drift, path: Path) -> None:
    """Losses above, differences below on a logarithmic axis with their limits."""
    from matplotlib.figure import Figure  # a figure without a window, whatever the backend

    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(one.losses) + 1)
    for run, style, marker in ((one, "-", "o"), (parallel, "--", "x")):
        losses.plot(steps, run.losses, style, linewidth=1, label=f"train, {run.name}")
        losses.plot(*zip(*run.held_out.items(), strict=True), marker, label=f"held out, {run.name}")
    losses.set(ylabel="nats per token", title=f"GPT-2 in one process and at {parallel.name}")
    losses.legend()
    for apart, label in ((drift, parallel.name), (yardstick, "one process, half the threads")):
        visible = [max(x, 1e-8) for x in apart.train]  # a logarithmic axis has no zero
        differences.semilogy(steps, visible, linewidth=1, label=f"{label} - one process")
    limits = [EARLY_LIMIT if step <= EARLY_STEPS else LIMIT for step in steps]
    differences.semilogy(steps, limits, "k:", label="limit", drawstyle="steps-pre")
    differences.set(xlabel="step", ylabel="difference of train losses")
    differences.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93))  # clear of all lines
    figure.savefig(path, dpi=120)
