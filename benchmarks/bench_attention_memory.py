"""Peak memory of a training step at 2,048 tokens: fused attention against scores in the open.

Transformers computes the attention of GPT-J and GPT-Neo by `[batch, heads, queries, keys]` scores;
`tensor_parallelism(fused_attention=True)`, the default, never allocates them. Each contestant
builds its model in processes of its own, and the peak is that of rank 0 above the built model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from contest import Contestant, Seat, record, require_equal
from models import Shape
from peak_memory import Peak
from systems import step_of, training

MAX_LOSS_DIFFERENCE = 1e-3
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=2048)
    args = parser.parse_args()
    result: dict[str, Any] = {"shape": vars(args)}
    print(f"{'family':10}{'contestant':24}{'peak MiB':>10}")
    for family in ("gptj", "gpt_neo"):
        shape = Shape(family, batch=1, vocabulary=1024, **vars(args))
        peaks = measured(shape)
        result[family] = peaks
        for name, value in peaks.items():
            print(f"{family:10}{name:24}{value / MIB:10.0f}")
    record("attention_memory_cpu", result)


def measured(shape: Shape) -> dict[str, int]:
    """Peak bytes of one step, by contestant."""
    ways = {
        "one process": (1, None),
        "tensorpar 2, unfused": (2, False),
        "tensorpar 2, fused": (2, True),
    }
    peaks, losses = {}, {}
    for name, (ranks, fused) in ways.items():
        work = partial(watched_step, shape, fused)
        with (
            tempfile.TemporaryDirectory() as folder,
            Contestant(work, ranks, ranks, folder) as contestant,
        ):
            _, (loss, peaks[name]) = contestant.turn()
            losses[name] = [loss]
    require_equal(losses, MAX_LOSS_DIFFERENCE)
    return peaks


def watched_step(shape: Shape, fused: bool | None, seat: Seat) -> Callable[[], tuple[float, int]]:
    step = step_of(training(built(shape, fused, seat)), shape)

    def watched() -> tuple[float, int]:
        with Peak() as peak:
            loss = step()
        return loss, peak.bytes

    return watched


def built(shape: Shape, fused: bool | None, seat: Seat) -> Any:
    if seat.num_ranks == 1:
        return shape.build()
    import tensorpar

    tensorpar.init(tensor_parallel_degree=seat.num_ranks, device_type="cpu")
    with tensorpar.tensor_parallelism(fused_attention=fused):
        return shape.build()


if __name__ == "__main__":
    main()
