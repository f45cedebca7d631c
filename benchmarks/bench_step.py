"""A training step, or a forward, of every family: tensorpar beside one process and its peers.

Contestants alternate within one run and share the same cores: tensorpar and its peers have one
process per rank of one thread each, one process has as many threads. Losses of every turn are
compared before any time is believed. `least work` and `kernels alone` are no contestants but
bounds: of tensorpar's step what no system can leave out, and all of it without Python. Run with
`make bench`, or for example `python benchmarks/bench_step.py --families gptj --widths 768`.
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
from least import KERNELS, LEAST, least
from models import FAMILIES, Shape
from systems import EVALUATING, ONE_CORE, PEERS, SYSTEMS, forward_only, training_step

#: dropout draws other masks on other systems, so their losses only resemble each other.
MAX_LOSS_DIFFERENCE, MAX_DROPOUT_DIFFERENCE = 1e-3, 1.0
WORK = {"train": training_step, "forward": forward_only}
BOUNDS = (LEAST, KERNELS)


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
    name = f"{run_name(args)}_cpu"
    record(name, {"rows": rows, "arguments": vars(args)})
    ratios = {
        f"{row['family']} {row['width']}": {"one process": 1.0}
        for row in rows
        if row["system"] == "one process"
    }
    for row in rows:
        if row["system"] != "one process":
            ratios[f"{row['family']} {row['width']}"][row["system"]] = row["ratio"]["median"]
    bars(ratios, name, f"{args.what}: time against one process with the same cores")


def run_name(args: argparse.Namespace) -> str:
    """What was measured, and in what it was not as usual."""
    widths = "_".join(map(str, args.widths))
    depth = "" if args.layers == Shape.layers else f"x{args.layers}"
    return f"{args.what}_{widths}{depth}_at_{args.sequence}" + "".join(
        words
        for words, holds in {
            f"_batch_{args.batch}": args.batch != Shape.batch,
            f"_vocabulary_{args.vocabulary}": args.vocabulary != Shape.vocabulary,
            "_dropout": args.dropout,
            "_without_peers": not set(PEERS).intersection(args.systems),
        }.items()
        if holds
    )


def measured(shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ways = {
            name: partial(
                Contestant,
                work(name, shape, args.what),
                1 if name in ("one process", ONE_CORE) else args.tp,
                1 if name == ONE_CORE else args.threads,
                folder,
            )
            for name in args.systems
        }
        contestants = present(stack, ways)
        times, losses = alternate(contestants, args.warmup, args.pairs)
        cpu = {name: one.cpu_seconds[args.warmup :] for name, one in contestants.items()}
    for bound in BOUNDS:
        losses.pop(bound, None)
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
            **{bound: ratio(times[bound], seconds) for bound in BOUNDS if bound in times},
            "last loss": losses[name][-1] if name in losses else None,
        }
        for name, seconds in times.items()
    ]
    show(rows)
    return rows


def work(system: str, shape: Shape, what: str) -> Work:
    """What a contestant does at each turn."""
    if system in BOUNDS:
        return partial(least, WORK[what], shape, bound=system)
    return partial(WORK[what], "one process" if system == ONE_CORE else system, shape)


def show(rows: list[Mapping[str, Any]]) -> None:
    """The table of one shape."""
    print(
        f"{'':24}{'median s':>9}{'best s':>8}{'CPU s':>8}{'ratio':>8}{'quartiles':>14}"
        f"{'of best':>9}{'tensorpar to it':>17}"
        + "".join(f"{bound + ' to it':>21}" for bound in BOUNDS if bound in rows[0])
    )
    for row in rows:
        own, ours = row["ratio"], row["tensorpar's ratio to it"]["median"]
        bounds = "".join(f"{row[bound]['median']:21.2f}" for bound in BOUNDS if bound in row)
        spread = "{:.2f} to {:.2f}".format(*own["quartiles"])
        print(
            f"{row['system']:24}{statistics.median(row['seconds']):9.3f}"
            f"{min(row['seconds']):8.3f}{statistics.median(row['cpu seconds']):8.3f}"
            f"{own['median']:8.2f}{spread:>14}{own['of best']:9.2f}{ours:17.2f}{bounds}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=WORK, default="train")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--systems", nargs="+", choices=[*EVALUATING, ONE_CORE])
    parser.add_argument("--bounds", action="store_true", help=" and ".join(BOUNDS))
    parser.add_argument("--widths", nargs="+", type=int, default=[512])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="cores that each side may use")
    for name in ("layers", "batch", "sequence", "vocabulary", "dropout"):
        default = getattr(Shape, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    every = EVALUATING if args.what == "forward" else SYSTEMS
    args.systems = args.systems or [*every, ONE_CORE]
    args.systems += [bound for bound in BOUNDS if args.bounds]
    return args


if __name__ == "__main__":
    main()
