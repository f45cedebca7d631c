"""What tensorpar costs besides arithmetic: importing it, building on meta, Python per layer.

* import: `import tensorpar` against `import torch.distributed.tensor`, each in a new process.
* construction: GPT-2 XL (1.5 billion parameters) on meta, one rank of two, once Transformers' code
  for it is imported, which is no part of tensorpar's work; beside Transformers' own.
* forward per layer: a model of width 64 in which Python is all there is, deep against shallow, so
  that only layers count; tensorpar on one rank against Transformers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from contest import Contestant, Seat, ratio, record
from models import FAMILIES, Shape

DEEP, SHALLOW = 26, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="imports of each")
    parser.add_argument("--forwards", type=int, default=300, help="of each model")
    args = parser.parse_args()
    result = {
        "import": imports(args.pairs),
        "construction": construction(),
        "forward per layer": {family: per_layer(family, args.forwards) for family in FAMILIES},
    }
    record("overhead_cpu", result)


def imports(pairs: int) -> dict[str, object]:
    """Seconds of both imports, alternating."""
    names = ("torch.distributed.tensor", "tensorpar")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(pairs + 1):
        for name in names:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = seconds["tensorpar"][1:], seconds["torch.distributed.tensor"][1:]
    told = ratio(ours, theirs)
    print(f"import: {told['median']:.2f} of torch.distributed.tensor's, limit 1.10")
    return {"ratio": told, "seconds": seconds}


def construction() -> dict[str, float]:
    """Seconds until GPT-2 XL stands on meta, the first time."""
    told = {}
    for name, parallel in (("Transformers", False), ("tensorpar", True)):
        work = partial(build_xl, parallel)
        with tempfile.TemporaryDirectory() as folder, Contestant(work, 2, 2, folder) as built:
            _, told[name] = built.turn()
    print(
        f"construction of GPT-2 XL on meta: {told['tensorpar']:.2f} s, limit 2 s "
        f"(Transformers {told['Transformers']:.2f} s)"
    )
    return told


def build_xl(parallel: bool, seat: Seat) -> Callable[[], float]:
    from transformers import GPT2Config, GPT2LMHeadModel

    import tensorpar

    tensorpar.init(tensor_parallel_degree=seat.num_ranks, device_type="cpu")
    config = GPT2Config(n_embd=1600, n_layer=48, n_head=25)

    def turn() -> float:
        start = time.perf_counter()
        with torch.device("meta"), tensorpar.tensor_parallelism(parallel):
            GPT2LMHeadModel(config)
        return time.perf_counter() - start

    return turn


def per_layer(family: str, forwards: int) -> dict[str, float]:
    """Microseconds of a layer's forward, from the difference between a deep and a shallow model.

    All stand in one process, take turns, and the best of each counts: what else the machine does
    only adds to it.
    """
    work = partial(bests, family, forwards)
    with tempfile.TemporaryDirectory() as folder, Contestant(work, 1, 1, folder) as alone:
        _, seconds = alone.turn()
    told = {
        system: 1e6 * (seconds[system, DEEP] - seconds[system, SHALLOW]) / (DEEP - SHALLOW)
        for system in ("Transformers", "tensorpar")
    }
    told["above"] = told["tensorpar"] - told["Transformers"]
    print(
        f"forward per layer, {family}: {told['above']:.0f} us above Transformers' "
        f"{told['Transformers']:.0f}, limit 40"
    )
    return told


def bests(family: str, forwards: int, seat: Seat) -> Callable[[], dict[tuple[str, int], float]]:
    """The shortest of some forwards of each system's models."""
    import tensorpar

    tensorpar.init(tensor_parallel_degree=seat.num_ranks, device_type="cpu")
    models = {}
    for layers in (DEEP, SHALLOW):
        shape = Shape(family, 64, layers, 1, 8, 128)
        models["Transformers", layers] = shape.build().eval()
        with tensorpar.tensor_parallelism():
            models["tensorpar", layers] = shape.build().eval()
    tokens = torch.zeros(shape.batch, shape.sequence, dtype=torch.long)

    def turn() -> dict[tuple[str, int], float]:
        seconds = dict.fromkeys(models, float("inf"))
        with torch.no_grad():
            for _ in range(forwards):
                for name, model in models.items():
                    start = time.perf_counter()
                    model(input_ids=tokens)
                    seconds[name] = min(seconds[name], time.perf_counter() - start)
        return seconds

    return turn


if __name__ == "__main__":
    main()
