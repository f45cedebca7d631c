"""A training step, or a forward, of every family: tensorpar beside one process and its peers.

Contestants alternate within one run and share the same cores: tensorpar and its peers have one
process per rank of one thread each, one process has as many threads. Losses of every turn are
compared before any time is believed. `least work` is no contestant but the bound of all: products,
kernels and collectives of tensorpar's step, and nothing between them. Run with `make bench`, or for
example `python benchmarks/bench_step.py --families gptj --widths 768 --sequence 1024`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from chart import bars
from contest import Contestant, Work, alternate, present, ratio, record, require_equal
from least import LEAST, least
from models import FAMILIES, Shape
from systems import EVALUATING, SYSTEMS, forward_only, training_step

#: dropout draws other masks on other systems, so their losses only resemble each other.
MAX_LOSS_DIFFERENCE, MAX_DROPOUT_DIFFERENCE = 1e-3, 1.0
WORK = {"train": training_step, "forward": forward_only}


def main() -> None:
    args = parse_arguments()
    rows: list[dict[str, Any]] = []
    for family in args.families:
        for width in args.widths:
            shape = Shape(
                family,
                width,
                layers=args.layers,
                batch=args.batch,
                sequence=args.sequence,
                vocabulary=args.vocabulary,
                dropout=args.dropout,
            )
            print(f"\n{args.what}: {shape}")
            rows += measured(shape, args)
    widths = "_".join(map(str, args.widths))
    depth = "" if args.layers == Shape.layers else f"x{args.layers}"
    name = f"{args.what}_{widths}{depth}_at_{args.sequence}" + ("_dropout" if args.dropout else "")
    record(f"{name}_cpu", {"rows": rows, "arguments": vars(args)})
    ratios = {
        f"{row['family']} {row['width']}": {"one process": 1.0}
        for row in rows
        if row["system"] == "one process"
    }
    for row in rows:
        if row["system"] != "one process":
            ratios[f"{row['family']} {row['width']}"][row["system"]] = row["ratio"]["median"]
    bars(ratios, f"{name}_cpu", f"{args.what}: time against one process with the same cores")


def measured(shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ways = {
            name: partial(
                Contestant,
                work(name, shape, args.what),
                1 if name == "one process" else args.tp,
                args.threads,
                folder,
            )
            for name in args.systems
        }
        contestants = present(stack, ways)
        times, losses = alternate(contestants, args.warmup, args.pairs)
        cpu = {name: one.cpu_seconds[args.warmup :] for name, one in contestants.items()}
    losses.pop(LEAST, None)
    require_equal(losses, MAX_DROPOUT_DIFFERENCE if shape.dropout else MAX_LOSS_DIFFERENCE)
    rows = [
        {
            "family": shape.family,
            "width": shape.width,
            "system": name,
            "seconds": seconds,
            "cpu seconds": cpu[name],
            "ratio": ratio(seconds, times["one process"]),
            "tensorpar's ratio to it": ratio(times["tensorpar"], seconds),
            **({LEAST: ratio(times[LEAST], seconds)} if LEAST in times else {}),
            "last loss": losses[name][-1] if name in losses else None,
        }
        for name, seconds in times.items()
    ]
    show(rows)
    return rows


def work(system: str, shape: Shape, what: str) -> Work:
    """What a contestant does at each turn."""
    if system == LEAST:
        return partial(least, WORK[what], shape)
    return partial(WORK[what], system, shape)


def show(rows: list[Mapping[str, Any]]) -> None:
    """The table of one shape."""
    print(
        f"{'':20}{'median s':>9}{'best s':>8}{'CPU s':>8}{'ratio':>8}{'quartiles':>14}"
        f"{'of best':>9}{'tensorpar to it':>17}{LEAST + ' to it':>18}"
    )
    for row in rows:
        own, ours = row["ratio"], row["tensorpar's ratio to it"]["median"]
        bound = f"{row[LEAST]['median']:18.2f}" if LEAST in row else ""
        spread = "{:.2f} to {:.2f}".format(*own["quartiles"])
        print(
            f"{row['system']:20}{statistics.median(row['seconds']):9.3f}"
            f"{min(row['seconds']):8.3f}{statistics.median(row['cpu seconds']):8.3f}"
            f"{own['median']:8.2f}{spread:>14}{own['of best']:9.2f}{ours:17.2f}{bound}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=WORK, default="train")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--systems", nargs="+", choices=[*EVALUATING, LEAST])
    parser.add_argument("--widths", nargs="+", type=int, default=[512])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="cores that each side may use")
    for name in ("layers", "batch", "sequence", "vocabulary", "dropout"):
        default = getattr(Shape, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    args.systems = args.systems or [*(EVALUATING if args.what == "forward" else SYSTEMS), LEAST]
    return args


if __name__ == "__main__":
    main()
