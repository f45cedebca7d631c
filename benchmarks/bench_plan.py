"""The peak memory that `tensorpar plan` predicts, against that of a real step on two ranks.

A rank's memory is what it holds above what it held before the model was built: parameters,
gradients, moments and activations. The step is forward, backward and AdamW; the first one, in which
moments are made, is not counted. A step of a tiny model comes before everything, for what a program
loads and allocates once. The allocator is told to give back what is freed. The command fails if a
prediction is off by more than 10 %.

    python benchmarks/bench_plan.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contest import Contestant, Seat, record
from models import FAMILIES, Shape
from peak_memory import memory

if TYPE_CHECKING:
    from tensorpar.planning.wanted import Wanted

TOLERANCE = 0.10
MB = 1e6
_CLEAR = Path("/proc/self/clear_refs")
#: glibc maps what is larger, and so returns it; by itself it raises the limit as it goes.
MAPPED_FROM = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tp", type=int, default=2)
    sizes = {"width": 512, "layers": 2, "batch": 2, "sequence": 512, "vocabulary": 4096}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args = vars(parser.parse_args())
    tp, families = args["tp"], args["families"]
    shapes = [Shape(family, **{name: args[name] for name in sizes}) for family in families]
    steps = [(shape, checkpointing) for shape in shapes for checkpointing in (False, True)]
    os.environ.update(MAPPED_FROM)
    planned = in_processes(planned_peak, steps, tp, ranks=1)
    measured = in_processes(measured_peak, steps, tp, ranks=tp)
    result: dict[str, Any] = {"shape": args}
    print(f"{'family':10}{'checkpointing':>14}{'planned MB':>12}{'measured MB':>13}{'ratio':>8}")
    for (shape, checkpointing), plan, real in zip(steps, planned, measured, strict=True):
        result[f"{shape.family}, checkpointing {checkpointing}"] = {
            "planned": plan,
            "measured": real,
            "measured / planned": real / plan,
        }
        row = f"{plan / MB:12.1f}{real / MB:13.1f}{real / plan:8.3f}"
        print(f"{shape.family:10}{checkpointing!s:>14}{row}")
    record("plan_cpu", result)
    worst = max(abs(real / plan - 1) for plan, real in zip(planned, measured, strict=True))
    return int(worst > TOLERANCE)


def in_processes(
    work: Callable[..., int], steps: list[tuple[Shape, bool]], tp: int, ranks: int
) -> list[int]:
    """What rank 0 returns for each step, all of one set of processes."""
    turns = partial(one_by_one, work, steps, tp)
    with (
        tempfile.TemporaryDirectory() as folder,
        Contestant(turns, ranks, ranks, folder) as contestant,
    ):
        return [contestant.turn()[1] for _ in steps]


def one_by_one(
    work: Callable[..., int], steps: list[tuple[Shape, bool]], tp: int, seat: Seat
) -> Callable[[], int]:
    """A process's work: the next step at each turn."""
    import torch

    import tensorpar

    if seat.num_ranks > 1:
        tensorpar.init(tensor_parallel_degree=tp, device_type="cpu")
    torch.manual_seed(0)
    left = iter(steps)
    return lambda: work(*next(left), tp)


def wanted(shape: Shape, checkpointing: bool, tp: int) -> Wanted:
    """What `tensorpar plan` is asked."""
    from tensorpar.planning.wanted import Wanted

    return Wanted(
        shape.config(),
        FAMILIES[shape.family][1],
        tp=tp,
        batch=shape.batch,
        sequence=shape.sequence,
        gradient_checkpointing=checkpointing,
    )


def planned_peak(*asked: Any) -> int:
    """Bytes, computed where nothing is allocated."""
    from tensorpar.planning.step import planned

    return planned(wanted(*asked)).peak


def measured_peak(shape: Shape, *asked: Any) -> int:
    """Bytes of a process that does it, after one that is too small to be seen."""
    stepped(wanted(Shape(shape.family, 64, 2, 1, 8, 97), *asked))
    return stepped(wanted(shape, *asked))


def stepped(wanted: Wanted) -> int:
    """The peak of the second step, above what was held before the model was built."""
    import tensorpar
    from tensorpar.planning import step

    before = settled_bytes()
    with tensorpar.tensor_parallelism(delayed_parameter_initialization=True):
        model = step.built(wanted)
    optimizer, given = step.optimizer_of(wanted, model), step.batch(wanted)

    def turn() -> None:
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    turn()
    lasting = settled_bytes() - before
    _CLEAR.write_text("5")  # the kernel's own record of the peak: nothing is too short for it
    resident = memory("VmRSS")
    turn()
    return lasting + memory("VmHWM") - resident


def settled_bytes() -> int:
    """Of this process, once all that is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory("RssAnon")


if __name__ == "__main__":
    sys.exit(main())
