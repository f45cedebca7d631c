"""On a GPU: tensorpar on one rank beside Transformers, and the shard of one rank of several.

* One rank: a training step against Transformers', both with sdpa, then with their blocks compiled;
  in processes of their own that take turns.
* A shard: the step of rank 0 of 2, 4 and 8 whose collectives do nothing (torch's fake process
  group), against 1 / tp of the whole step: what is left of the GPU's speed when products shrink.
  Its loss means nothing.
* Kernel launches per layer of a step: a deep model's less a shallow one's.

Shapes are GPT-J-6B's width in bfloat16. Without a GPU the script says so and ends; `--device cpu`
with a small `--width` shows that it runs. Run as `python benchmarks/bench_gpu.py`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from contest import Contestant, Seat, alternate, ratio, record, require_equal
from models import FAMILIES, Shape
from systems import batches, training

#: of losses around 11 in bfloat16.
MAX_LOSS_DIFFERENCE = 0.1
DEGREES = (2, 4, 8)
SHALLOW = 1


def main() -> None:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench_gpu: not shown, there is no GPU here")
        return
    shape = Shape(args.family, args.width, args.layers, args.batch, args.sequence, 50400)
    print(shape)
    result = {
        "arguments": vars(args),
        "one rank": {
            name: one_rank(shape, args, compiled=compiled)
            for name, compiled in (("plain", False), ("compiled", True))
        },
        "shards": shards(shape, args),
    }
    if args.device == "cuda":
        result["GPU"] = torch.cuda.get_device_name()
        result["launches per layer"] = launches(shape, args)
    record(f"gpu_{args.device}", result)


def one_rank(shape: Shape, args: argparse.Namespace, *, compiled: bool) -> dict[str, Any]:
    """tensorpar's ratio to Transformers."""
    ways = {
        name: partial(step, shape, tp, args.device, compiled)
        for name, tp in (("Transformers", 0), ("tensorpar", 1))
    }
    times, losses = taking_turns(ways, args)
    require_equal(losses, MAX_LOSS_DIFFERENCE)
    told = ratio(times["tensorpar"], times["Transformers"])
    kind = "compiled" if compiled else "plain"
    print(f"one rank, {kind}: {told['median']:.3f} of Transformers', limit 1.00")
    return {"ratio": told, "seconds": times}


def shards(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """By degree, the part of the GPU's speed that a shard keeps."""
    degrees = [tp for tp in DEGREES if tp <= shape.width // 64]
    ways = {str(tp): partial(step, shape, tp, args.device, False) for tp in (1, *degrees)}
    times, _ = taking_turns(ways, args)
    told = {}
    for tp in map(str, degrees):
        of_whole = ratio(times["1"], times[tp])
        told[tp] = {"efficiency": of_whole["median"] / int(tp), "seconds": times[tp]}
        print(f"shard of tp {tp}: {told[tp]['efficiency']:.2f} of the whole step's efficiency")
    return told


def taking_turns(
    ways: dict[str, Callable[[Seat], Callable[[], float]]], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        contestants = {
            name: stack.enter_context(Contestant(work, 1, args.threads, folder))
            for name, work in ways.items()
        }
        return alternate(contestants, args.warmup, args.pairs)


def step(shape: Shape, tp: int, device: str, compiled: bool, _: Seat) -> Callable[[], float]:
    """A training step of rank 0 of `tp`, alone; of Transformers for 0. Returns the loss."""
    model = built(shape, tp, device)
    if compiled:
        for block in blocks(model):
            block.compile()
    made = training(model)
    tokens = next(batches(shape)).to(device)

    def turn() -> float:
        loss = made.model(input_ids=tokens, labels=tokens).loss
        made.backward(loss)
        made.update()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return turn


def built(shape: Shape, tp: int, device: str) -> Any:
    """In bfloat16, on the device."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(device)
    try:
        if not tp:
            return shape.build()
        import tensorpar

        pretend(tp)
        tensorpar.init(tensor_parallel_degree=tp, device_type=device)
        with tensorpar.tensor_parallelism():
            return shape.build()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def pretend(num_ranks: int) -> None:
    """To be rank 0 of a world whose collectives do nothing."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    torch.distributed.init_process_group("fake", store=HashStore(), rank=0, world_size=num_ranks)


def blocks(model: Any) -> list[Any]:
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len))


def launches(shape: Shape, args: argparse.Namespace) -> dict[str, float]:
    """Kernel launches of a layer, forward, backward and update."""
    told = {}
    for name, tp in (("Transformers", 0), ("tensorpar", 1)):
        counts = []
        for layers in (shape.layers + SHALLOW, SHALLOW):
            work = partial(counted, replace(shape, layers=layers), tp, args.device)
            with (
                tempfile.TemporaryDirectory() as folder,
                Contestant(work, 1, args.threads, folder) as contestant,
            ):
                counts.append(statistics.median(contestant.turn()[1] for _ in range(3)))
        told[name] = (counts[0] - counts[1]) / shape.layers
        print(f"kernel launches per layer, {name}: {told[name]:.1f}")
    return told


def counted(shape: Shape, tp: int, device: str, seat: Seat) -> Callable[[], int]:
    one = step(shape, tp, device, False, seat)
    one()

    def turn() -> int:
        with torch.profiler.profile() as profile:
            one()
        return sum(e.count for e in profile.key_averages() if "LaunchKernel" in e.key)

    return turn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--family", choices=FAMILIES, default="gptj")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    for name, default in (("width", 4096), ("layers", 2), ("batch", 4), ("sequence", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
