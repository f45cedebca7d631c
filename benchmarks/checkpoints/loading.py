"""`from_pretrained` under tensor parallelism against Transformers in one process.

A turn ends when every parameter has been read once: the bits of all are added up, which also tells
whether all contestants loaded the same. First with the file in the page cache, then without it, as
far as the system lets go of it. GPT-NeoX is also loaded by Transformers' own tensor parallelism.

"least work" is what no loading can do without that gives contiguous shards: rows stay mapped from
the file, columns are copied out of it, and there is no model at all.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contest import Seat, alternate, entered, ratio, record
from peak_memory import Peak
from torch.distributed.tensor import DTensor

from checkpoints.folders import (
    affordable,
    bring_into_cache,
    drop_from_cache,
    file_system,
    make_model,
)

FILE = "model.safetensors"
#: what ends the names of weights that are cut into columns, GPT-J's and GPT-NeoX's.
COLUMNS = ("out_proj.weight", "fc_out.weight", "attention.dense.weight", "dense_4h_to_h.weight")
#: those that are this rank's part, and those that are whole.
Tensors = tuple[list[torch.Tensor], list[torch.Tensor]]


def measure(args: argparse.Namespace) -> None:
    result: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(args).items()}}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-loading-") as name:
        folder = Path(name)
        size = affordable(args.size, folder)
        for family in ("gptj", "gptneox"):
            source = folder / family
            make_model(source, size, family)
            num_bytes = (source / FILE).stat().st_size
            print(f"{family}: {num_bytes / 1e9:.2f} GB on {file_system(folder)}")
            result[family] = {"bytes": num_bytes}
            for cache, prepare in (
                ("in the cache", bring_into_cache),
                ("dropped", drop_from_cache),
            ):
                print(f"the file {cache}:")
                result[family][cache] = contest(args, family, source, prepare)
    record("loading_cpu", result)


def contest(
    args: argparse.Namespace, family: str, source: Path, prepare: Callable[[Path], bool | None]
) -> dict[str, Any]:
    """Turns of all contestants for one model, its file prepared before each."""
    if prepare is drop_from_cache and not prepare(source / FILE):
        print("not shown, the system keeps its pages")
        return {}
    ways = {
        "transformers": ("one process", 1),
        "tensorpar, tp 2": ("tensorpar", 2),
        "tensorpar, tp 4": ("tensorpar", 4),
        "least work, tp 2": ("least work", 2),
        "least work, tp 4": ("least work", 4),
    }
    if family == "gptneox":
        ways["transformers, tp 2"] = ("transformers", 2)
    entries = {
        name: (partial(loads, str(source), way, prepare), ranks)
        for name, (way, ranks) in ways.items()
    }
    with ExitStack() as stack:
        contestants = entered(stack, entries, args.threads, source.parent)
        _, results = alternate(contestants, warmup=1, turns=args.turns)
    if len({told["sum"] for turns in results.values() for told in turns}) > 1:
        raise SystemExit("the contestants loaded different values")
    times = {
        name: [max(rank["seconds"] for rank in told["ranks"]) for told in results[name][1:]]
        for name in entries
    }
    num_bytes = (source / FILE).stat().st_size
    return {name: row(name, times, results[name][1:], num_bytes) for name in entries}


def loads(
    source: str, way: str, prepare: Callable[[Path], object], seat: Seat
) -> Callable[[], dict[str, Any]]:
    """A process that loads the model and forgets it, time after time."""
    from tensorpar.files.reading import counting

    file = Path(source) / FILE
    load = partial(slices, file, seat) if way == "least work" else loader(source, way, seat)

    def turn() -> dict[str, Any]:
        if seat.rank == 0:
            prepare(file)
        seat.from_all(None)
        with Peak() as peak, counting() as requested:
            start = time.perf_counter()
            loaded = load()
            total, held = read_once(loaded, seat)
            seconds = time.perf_counter() - start
        del loaded
        gc.collect()  # what is mapped stays in the cache
        told = {"requested": requested.num_bytes, "peak": peak.bytes, "held": held}
        return {"sum": total, "ranks": seat.from_all(told | {"seconds": seconds})}

    return turn


def loader(source: str, way: str, seat: Seat) -> Callable[[], torch.nn.Module]:
    """What loads the model, set up."""
    import transformers

    import tensorpar

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if way == "tensorpar":
        tensorpar.init(tensor_parallel_degree=seat.num_ranks, device_type="cpu")
    if way == "transformers":
        told = {"RANK": seat.rank, "LOCAL_RANK": seat.rank, "WORLD_SIZE": seat.num_ranks}
        os.environ.update({name: str(value) for name, value in told.items()})
        options["tp_plan"] = "auto"

    def load() -> torch.nn.Module:
        context = tensorpar.tensor_parallelism if way == "tensorpar" else nullcontext
        with context():
            return transformers.AutoModelForCausalLM.from_pretrained(source, **options)

    return load


def slices(file: Path, seat: Seat) -> Tensors:
    """This rank's part of each tensor, cut where tensorpar cuts it."""
    from tensorpar.files.reading import open_sources
    from tensorpar.paging import empty_in_large_pages

    sharded, whole = [], []
    with ExitStack() as stack:
        for name, tensor in open_sources(stack, [file], last=True).items():
            if name.endswith(COLUMNS):
                size = tensor.shape[1] // seat.num_ranks
                columns = tensor[:, seat.rank * size : (seat.rank + 1) * size]
                sharded.append(empty_in_large_pages(columns.shape, columns.dtype).copy_(columns))
            elif len(tensor.shape) == 2:
                size = tensor.shape[0] // seat.num_ranks
                sharded.append(tensor[seat.rank * size : (seat.rank + 1) * size])
            else:
                whole.append(tensor[...])
    return sharded, whole


def read_once(loaded: torch.nn.Module | Tensors, seat: Seat) -> tuple[int, int]:
    """The sum of all parameters' bits over all ranks, and the bytes that this rank holds."""
    sharded, whole = parted(loaded) if isinstance(loaded, torch.nn.Module) else loaded
    total = sum(seat.from_all(sum(map(bits, sharded)))) + sum(map(bits, whole))
    return total, sum(tensor.nbytes for tensor in (*sharded, *whole))


def parted(model: torch.nn.Module) -> Tensors:
    """A model's parameters, as this rank holds them: those that are its part, and whole ones."""
    sharded, whole = [], []
    for parameter in model.parameters():
        values = parameter.detach()
        if not isinstance(values, DTensor):
            whole.append(values)
        elif values.placements[0].is_replicate():
            whole.append(values.to_local())
        else:
            sharded.append(values.to_local())
    return sharded, whole


def bits(values: torch.Tensor) -> int:
    """Of a 2-byte tensor; a few at a time, since a sum of integers first makes them all wider."""
    pieces = values.contiguous().view(-1).view(torch.int16).split(1 << 18)
    return sum(int(piece.sum(dtype=torch.int64)) for piece in pieces)


def row(
    name: str,
    times: dict[str, list[float]],
    results: list[dict[str, Any]],
    num_bytes: int,
) -> dict[str, Any]:
    """What is told of a contestant: by rank the largest number."""
    most = {
        what: max(rank[what] for told in results for rank in told["ranks"])
        for what in ("requested", "peak", "held")
    }
    against = ratio(times[name], times["transformers"])
    share = {what: value / num_bytes for what, value in most.items()}
    print(
        f"{name:20}{statistics.median(times[name]):8.2f} s  {against['median']:.2f} of one process"
        f"   of the file: holds {share['held']:.3f}, requested {share['requested']:.3f}, "
        f"peak {share['peak']:.3f}"
    )
    return {"seconds": times[name], "ratio": against, "of the file": share}
