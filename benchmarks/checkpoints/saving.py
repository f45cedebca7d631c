"""`save_pretrained` of a model on two ranks against Transformers in one process.

Transformers leaves what it wrote to the operating system; tensorpar returns when it is on the disk.
So both are measured both ways: Transformers also followed by `sync -f`, and tensorpar also with its
syncing taken out; each is compared with the other's same way.

On a virtual machine that returns free memory to its host, the unsynced times of Transformers differ
by a factor of ten from turn to turn: it writes a tensor by one call, for which Linux takes large
pages, and these the host may have to give first. Believe the synced ones there.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import Seat, alternate, entered, ratio, record
from peak_memory import Peak

from checkpoints.folders import affordable, file_system, make_model, settle

MB = 1 << 20


def measure(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-saving-") as name:
        folder = Path(name)
        source = folder / "hf"
        largest = make_model(source, affordable(args.size, folder))
        num_bytes = (source / "model.safetensors").stat().st_size
        print(f"{num_bytes / 1e9:.2f} GB on {file_system(folder)}, largest tensor {largest:,} B")
        ways = {
            "transformers, not synced": (1, "left"),
            "tensorpar, not synced": (2, "left"),
            "transformers, synced": (1, "synced"),
            "tensorpar, synced": (2, "synced"),
            "tensorpar, synced, ranks apart": (2, "apart"),
        }
        entries = {
            name: (partial(saves, str(source), how), ranks) for name, (ranks, how) in ways.items()
        }
        with ExitStack() as stack:
            contestants = entered(stack, entries, args.threads, folder)
            _, results = alternate(contestants, warmup=1, turns=args.turns)
    if len({told["crc"] for turns in results.values() for told in turns}) > 1:
        raise SystemExit("the contestants wrote different files")
    rows = {name: row(name, results) for name in entries}
    arguments = {key: str(value) for key, value in vars(args).items()}
    record("saving_cpu", {"rows": rows, "bytes": num_bytes, "arguments": arguments})


def saves(source: str, how: str, seat: Seat) -> Callable[[], dict[str, Any]]:
    """A process that saves a model into a new folder, time after time.

    `how`: what is written is "left" to the operating system, or "synced"; or it is, with ranks that
    do not find out that they share a machine ("apart").
    """
    import transformers

    import tensorpar
    from tensorpar.files import replacing, writing
    from tensorpar.saving import own_parts

    transformers.utils.logging.disable_progress_bar()
    parallel = seat.num_ranks > 1
    if parallel:
        tensorpar.init(tensor_parallel_degree=seat.num_ranks, device_type="cpu")
    with tensorpar.tensor_parallelism() if parallel else nullcontext():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if parallel and how == "left":
        replacing.sync = lambda _: None
        writing.start_writing = own_parts.start_writing = lambda *_: None
    if how == "apart":
        own_parts.make_shared = lambda *_: None
    out = Path(source).with_name(f"out-{seat.num_ranks}-{how}")

    def turn() -> dict[str, Any]:
        if seat.rank == 0:
            settle(out)
        if parallel:
            dist.barrier()
        with Peak() as peak:
            start = time.perf_counter()
            model.save_pretrained(out)
            if how == "synced" and not parallel:
                subprocess.run(["sync", "-f", out], check=True)
            seconds = time.perf_counter() - start
        told = {"seconds": seconds, "peaks": seat.from_all(peak.bytes)}
        if seat.rank == 0:
            told["crc"] = subprocess.run(
                ["cksum"], stdin=(out / "model.safetensors").open(), capture_output=True, check=True
            ).stdout
            shutil.rmtree(out)
        return told

    return turn


def row(name: str, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What is told of a contestant, the first turn left out."""
    against = f"transformers, {'not ' * ('not synced' in name)}synced"
    seconds, theirs = ([told["seconds"] for told in results[one][1:]] for one in (name, against))
    quotient = ratio(seconds, theirs)
    peaks = [max(of) for of in zip(*(told["peaks"] for told in results[name][1:]), strict=True)]
    memory = ", ".join(f"{peak / MB:.0f}" for peak in peaks)
    print(
        f"{name:30}{statistics.median(seconds):6.2f} s{quotient['median']:6.2f} of that of "
        f"{against:22}RssAnon {memory} MB"
    )
    return {"seconds": seconds, "ratio": quotient, "of": against, "peak RssAnon by rank": peaks}
