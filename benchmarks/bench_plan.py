"""The peak memory that `tensorpar plan` predicts, against that of a real step on two ranks.

A rank's memory is its RssAnon above what it was after imports and `tensorpar.init`: all that the
model, its gradients, moments and activations made it. The step is forward, backward and AdamW; the
first one, in which moments are made, is not counted. The command fails if a prediction is off by
more than 10 %.

    python benchmarks/bench_plan.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from contest import Contestant, Seat, record
from models import FAMILIES, Shape
from peak_memory import Peak, anonymous_bytes

TOLERANCE = 0.10
MB = 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["gpt2", "gptj"])
    parser.add_argument("--tp", type=int, default=2)
    for name in ("width", "layers", "batch", "sequence", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name))
    args = parser.parse_args()
    sizes = {name: value for name, value in vars(args).items() if name not in ("families", "tp")}
    result: dict[str, Any] = {"shape": vars(args)}
    print(f"{'family':10}{'checkpointing':>14}{'planned MB':>12}{'measured MB':>13}{'ratio':>8}")
    for family in args.families:
        for checkpointing in (False, True):
            work = partial(watched_step, Shape(family, **sizes), args.tp, checkpointing)
            planned, measured = in_processes(work, args.tp)
            ratio = measured / planned
            result[f"{family}, checkpointing {checkpointing}"] = {
                "planned": planned,
                "measured": measured,
                "measured / planned": ratio,
            }
            row = f"{planned / MB:12.1f}{measured / MB:13.1f}{ratio:8.3f}"
            print(f"{family:10}{checkpointing!s:>14}{row}", flush=True)
    record("plan_cpu", result)
    ratios = [row["measured / planned"] for row in result.values() if "planned" in row]
    return int(any(abs(ratio - 1) > TOLERANCE for ratio in ratios))


def in_processes(work: Callable[[Seat], Callable[[], int]], tp: int) -> tuple[int, int]:
    """The prediction, made where nothing is allocated, and rank 0's peak bytes."""
    with tempfile.TemporaryDirectory() as folder:
        with Contestant(work, 1, 1, folder) as contestant:
            _, planned = contestant.turn()
        with Contestant(work, tp, tp, folder) as contestant:
            contestant.turn()
            _, measured = contestant.turn()
    return planned, measured


def watched_step(shape: Shape, tp: int, checkpointing: bool, seat: Seat) -> Callable[[], int]:
    """One process: the planned peak; several: the bytes of a step above those before the model."""
    import tensorpar
    from tensorpar.planning import step
    from tensorpar.planning.wanted import Wanted

    wanted = Wanted(
        shape.config(),
        FAMILIES[shape.family][1],
        tp=tp,
        batch=shape.batch,
        sequence=shape.sequence,
        gradient_checkpointing=checkpointing,
    )
    if seat.num_ranks == 1:
        return lambda: step.planned(wanted).peak
    tensorpar.init(tensor_parallel_degree=tp, device_type="cpu")
    before = anonymous_bytes()
    with tensorpar.tensor_parallelism(delayed_parameter_initialization=True):
        model = step.built(wanted)
    optimizer, given = step.optimizer_of(wanted, model), step.batch(wanted)

    def turn() -> int:
        built = anonymous_bytes()
        with Peak() as peak:
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return built - before + peak.bytes

    return turn


if __name__ == "__main__":
    sys.exit(main())
