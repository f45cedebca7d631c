"""Activations kept for backward: the sequence whole on every rank, against split between regions.

`tensor_parallelism(sequence_parallel=True)` keeps each rank's rows of what is the same on all ranks
otherwise: the residual stream, what norms read, and dropout's masks. Counted are the storages that
autograd saves in one forward, what lasts anyway left out, on rank 0: bytes, which repeat exactly,
and not the peak of a process, which does not. Nothing is printed unless the losses are equal, the
split sequence takes less than the whole one, and all are what `tensorpar plan` says, to the byte.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contest import Contestant, Seat, record, require_equal
from models import FAMILIES, Shape

from tensorpar.planning.counting import Kept
from tensorpar.planning.step import planned
from tensorpar.planning.wanted import Wanted

MAX_LOSS_DIFFERENCE = 1e-3
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    args = vars(parser.parse_args())
    families = args.pop("families")
    result: dict[str, Any] = {"shape": args}
    print(f"{'family':10}{'contestant':24}{'MiB saved':>10}")
    for family in families:
        shape = Shape(family, batch=1, vocabulary=1024, **args)
        result[family] = measured(shape)
        for name, value in result[family].items():
            print(f"{family:10}{name:24}{value / MIB:10.1f}")
    record("sequence_memory_cpu", result)


def measured(shape: Shape) -> dict[str, int]:
    """Bytes that autograd saves in one training forward, by contestant."""
    ways = {
        f"{ranks} ranks, {name}": (ranks, split)
        for ranks in (2, 4)
        for name, split in (("whole", False), ("split", True))
    }
    saved, losses = {}, {}
    for name, (ranks, split) in ways.items():
        work = partial(watched_forward, shape, split)
        with (
            tempfile.TemporaryDirectory() as folder,
            Contestant(work, ranks, ranks, folder) as contestant,
        ):
            _, (loss, saved[name]) = contestant.turn()
            losses[name] = [loss]
        job = Wanted(
            shape.config(),
            FAMILIES[shape.family][1],
            tp=ranks,
            batch=shape.batch,
            sequence=shape.sequence,
            sequence_parallel=split,
        )
        require(f"{shape.family}, {name}, bytes", saved[name], planned(job).activations)
    if not shape.dropout:  # masks differ between degrees
        require_equal(losses, MAX_LOSS_DIFFERENCE)
    for ranks in (2, 4):
        whole, split = saved[f"{ranks} ranks, whole"], saved[f"{ranks} ranks, split"]
        require(f"{shape.family}, {ranks} ranks, bytes saved", whole > split, True)
    return saved


def require(name: str, found: Any, expected: Any) -> None:
    """Exit unless they are the same."""
    if found != expected:
        raise SystemExit(f"{name} = {found}, required: {expected}")


def watched_forward(shape: Shape, split: bool, seat: Seat) -> Callable[[], tuple[float, int]]:
    import tensorpar

    tensorpar.init(tensor_parallel_degree=seat.num_ranks, device_type="cpu")
    with tensorpar.tensor_parallelism(sequence_parallel=split):
        model = shape.build()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence), generator=generator)

    def watched() -> tuple[float, int]:
        torch.manual_seed(1)
        with Kept() as kept:
            loss = model(input_ids=tokens, labels=tokens).loss
        lasting = [*model.parameters(), *model.buffers(), tokens]
        return loss.item(), kept.num_bytes(apart_from=lasting)

    return watched


if __name__ == "__main__":
    main()
