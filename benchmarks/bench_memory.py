"""What a training step holds and sends: tensorpar beside one process and its peers.

* Memory: the peak of rank 0's anonymous memory in a step (not the first, in which moments are
  made) above what it was after imports, initialisation and the steps of a tiny model. tensorpar's
  is held against the peak that `tensorpar plan` derives without allocating anything.
* Communication: calls and bytes of every collective of a step. tensorpar's must equal the plan's,
  kind by kind, or the command fails; the batch check is a kind of its own. Clipping, which a plan
  does not have, is shown beside it.

Contestants run one after the other: what they hold does not depend on what else runs. Losses are
compared before any figure is believed. Run as `python benchmarks/bench_memory.py --families bert`.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from contest import AbsentError, Contestant, Seat, record, require_equal
from models import FAMILIES, Shape
from peak_memory import Peak, anonymous_bytes
from systems import SYSTEMS, Training, batches, step_of

from tensorpar.planning import step as planning
from tensorpar.planning.counting import Sent, Traffic
from tensorpar.planning.wanted import Wanted

MAX_LOSS_DIFFERENCE = 1e-3
MAX_ABOVE_PLAN, MAX_OF_ONE_PROCESS = 1.05, 0.55
MB = 1e6
CLIPPING = "clipping"
# a freed tensor is given back: what malloc keeps for later is neither held nor the same twice
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")


@dataclass(frozen=True)
class Held:
    """Of rank 0; bytes.

    Attributes:
        peak: in a step, above imports and initialisation.
        sent: collectives of a step, by what they do and what for.
        loss: of the last step.
    """

    peak: int
    sent: Mapping[str, Sent]
    loss: float


def main() -> None:
    args = parse_arguments()
    sizes = {name: getattr(args, name) for name in ("width", "layers", "batch", "sequence")}
    rows: list[dict[str, Any]] = []
    for family in args.families:
        shape = Shape(family, vocabulary=args.vocabulary, **sizes)
        print(f"\n{shape}")
        rows += measured(shape, args.systems, args.tp)
    record(f"memory_{args.sequence}_cpu", {"rows": rows, "arguments": vars(args)})


def measured(shape: Shape, systems: Iterable[str], tp: int) -> list[dict[str, Any]]:
    """A row for each contestant, the plan's first."""
    _, plan = alone(partial(planned, shape, tp), 1, tp)
    held: dict[str, Held] = {}
    for name in systems:
        ranks = 1 if name == "one process" else tp
        try:
            _, held[name] = alone(partial(watched, name, shape), ranks, tp)
        except AbsentError as reason:
            print(f"{name}: not shown, {reason}")
    require_equal({name: [one.loss] for name, one in held.items()}, MAX_LOSS_DIFFERENCE)
    rows = [
        {
            "family": shape.family,
            "system": name,
            "peak": one.peak,
            "to the plan": one.peak / plan.peak,
            "to one process": one.peak / held["one process"].peak,
            "sent": {kind: asdict(sent) for kind, sent in one.sent.items()},
        }
        for name, one in {"tensorpar's plan": plan, **held}.items()
    ]
    show(rows)
    judge(plan, held)
    return rows


def alone(work: Callable[[Seat], Callable[[], Held]], ranks: int, threads: int) -> Any:
    """One turn of a contestant, in processes that end with it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Contestant(work, ranks, threads, folder) as contestant,
    ):
        return contestant.turn()


def planned(shape: Shape, tp: int, _: Seat) -> Callable[[], Held]:
    """What `tensorpar plan` says."""
    wanted = Wanted(
        shape.config(),
        FAMILIES[shape.family][1],
        tp=tp,
        batch=shape.batch,
        sequence=shape.sequence,
    )

    def turn() -> Held:
        figures = planning.planned(wanted)
        return Held(figures.peak, figures.sent, float("nan"))

    return turn


def watched(system: str, shape: Shape, seat: Seat) -> Callable[[], Held]:
    """A contestant whose libraries are loaded and have run."""
    tiny = replace(shape, width=128, layers=2, batch=1, sequence=8, vocabulary=512)
    warm = step_of(SYSTEMS[system](tiny, seat), tiny)
    warm()
    warm()
    del warm
    gc.collect()
    before = anonymous_bytes()
    training = SYSTEMS[system](shape, seat)
    step = step_of(training, shape)

    def turn() -> Held:
        step()
        gc.collect()
        steady = anonymous_bytes() - before
        with Peak() as peak:
            loss = step()
        return Held(steady + peak.bytes, traffic(training, shape), loss)

    return turn


def traffic(training: Training, shape: Shape) -> Mapping[str, Sent]:
    """The collectives of a step."""
    tokens = next(batches(shape))
    with Traffic() as seen:
        seen.phase = "forward"
        with training.forward():
            loss = training.model(input_ids=tokens, labels=tokens).loss
        seen.phase = "backward"
        training.backward(loss)
        seen.phase = CLIPPING  # and the optimizer's step, which sends nothing
        training.update()
    return seen.sent


def show(rows: Iterable[Mapping[str, Any]]) -> None:
    """The table of one shape."""
    print(f"{'':20}{'peak MB':>10}{'to plan':>9}{'to one':>8}{'calls':>7}{'sent MB':>9}")
    for row in rows:
        calls = sum(sent["num_calls"] for sent in row["sent"].values())
        num_bytes = sum(sent["num_bytes"] for sent in row["sent"].values())
        print(
            f"{row['system']:20}{row['peak'] / MB:10.1f}{row['to the plan']:9.3f}"
            f"{row['to one process']:8.3f}{calls:7}{num_bytes / MB:9.2f}"
        )


def judge(plan: Held, held: Mapping[str, Held]) -> None:
    """Exit unless tensorpar sends what is planned; its kinds, and the targets of its memory."""
    ours = held["tensorpar"]
    for kind, sent in sorted(ours.sent.items()):
        print(f"  tensorpar, {kind}: {sent.num_calls} calls, {sent.num_bytes} bytes")
    sent = {kind: one for kind, one in ours.sent.items() if CLIPPING not in kind}
    if sent != dict(plan.sent):
        raise SystemExit(f"tensorpar sends {sent}, required: the plan's {dict(plan.sent)}")
    limits = {
        "the plan": (plan.peak, MAX_ABOVE_PLAN),
        **{name: (one.peak, 1.0) for name, one in held.items() if name != "tensorpar"},
    }
    limits["one process"] = limits["one process"][0], MAX_OF_ONE_PROCESS
    for name, (peak, limit) in limits.items():
        met = "met" if ours.peak <= limit * peak else "NOT met"
        print(f"  memory to {name}: {ours.peak / peak:.3f}, limit {limit:.2f}: {met}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--tp", type=int, default=2)
    for name in ("width", "layers", "batch", "sequence", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name))
    return parser.parse_args()


if __name__ == "__main__":
    main()
