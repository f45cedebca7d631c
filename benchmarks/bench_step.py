"""One training step: tensor parallel on two processes against one process with both cores.

The two contestants alternate within one run, and the losses of every step are compared before any
time is believed. Run with `make bench`, or `python benchmarks/bench_step.py --family gptj`.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from contest import Contestant, Seat, alternate, ratio, record, require_equal
from models import FAMILIES, Shape

MAX_LOSS_DIFFERENCE = 1e-3


def main() -> None:
    args = parse_arguments()
    shape = Shape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Shape)})
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        work = partial(training_step, shape)
        contestants = {
            name: stack.enter_context(Contestant(work, ranks, args.threads, folder))
            for name, ranks in (("one process", 1), ("tensorpar", args.tp))
        }
        times, losses = alternate(contestants, args.warmup, args.pairs)
    require_equal(losses, MAX_LOSS_DIFFERENCE)
    print(f"\n{'contestant':14}{'median s':>10}{'best s':>10}{'last loss':>12}")
    for name, seconds in times.items():
        row = f"{statistics.median(seconds):10.3f}{min(seconds):10.3f}{losses[name][-1]:12.5f}"
        print(f"{name:14}{row}")
    ours = ratio(times["tensorpar"], times["one process"])
    low, high = ours["quartiles"]
    print(
        f"ratio tensorpar / one process: {ours['median']:.3f} (quartiles {low:.3f} to {high:.3f})"
    )
    record("step_cpu", {"ratio": ours, "seconds": times, "shape": vars(args)})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="cores that each side may use")
    parser.add_argument("--family", choices=FAMILIES, default=Shape.family)
    for field in dataclasses.fields(Shape)[1:]:
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    return parser.parse_args()


def training_step(shape: Shape, seat: Seat) -> Callable[[], float]:
    if seat.num_ranks == 1:
        return shape.step_of(shape.build())
    import tensorpar

    with tensorpar.tensor_parallelism():
        return shape.step_of(shape.build())


if __name__ == "__main__":
    main()
