"""`save_pretrained` of a model on two ranks against Transformers in one process.

Transformers leaves what it wrote to the operating system; tensorpar returns when it is on the disk.
So both are also measured the other way: Transformers followed by `sync -f`, and tensorpar with its
syncing taken out. Run as `python benchmarks/bench_saving.py --size 1 --turns 5`.
"""

from __future__ import annotations

import argparse
import os
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
from bench_loading import from_all
from contest import Contestant, Seat, alternate, ratio, record
from folders import affordable, file_system, make_model, settle
from peak_memory import Peak

MB = 1 << 20


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-saving-") as name:
        folder = Path(name)
        source = folder / "hf"
        largest = make_model(source, affordable(args.size, folder))
        num_bytes = (source / "model.safetensors").stat().st_size
        print(f"{num_bytes / 1e9:.2f} GB on {file_system(folder)}, largest tensor {largest:,} B")
        entries = {
            "transformers": (1, False),
            "transformers, synced": (1, True),
            "tensorpar, not synced": (2, False),
            "tensorpar": (2, True),
        }
        with ExitStack() as stack:
            contestants = {
                name: stack.enter_context(
                    Contestant(
                        partial(saves, str(source), synced), ranks, args.threads, str(folder)
                    )
                )
                for name, (ranks, synced) in entries.items()
            }
            _, results = alternate(contestants, warmup=1, turns=args.turns)
    if len({told["crc"] for turns in results.values() for told in turns}) > 1:
        raise SystemExit("the contestants wrote different files")
    rows = {name: row(name, results) for name in entries}
    arguments = {key: str(value) for key, value in vars(args).items()}
    record("saving_cpu", {"rows": rows, "bytes": num_bytes, "arguments": arguments})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1, help="billions of parameters")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    return parser.parse_args()


def saves(source: str, synced: bool, seat: Seat) -> Callable[[], dict[str, Any]]:
    """A process that saves a model into a new folder, time after time."""
    import transformers

    import tensorpar
    from tensorpar.files import replacing, writing

    transformers.utils.logging.disable_progress_bar()
    parallel = seat.num_ranks > 1
    with tensorpar.tensor_parallelism() if parallel else nullcontext():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if parallel and not synced:
        replacing.sync = lambda _: None
        writing.start_writing = lambda *_: None
    out = Path(source).with_name(f"out-{seat.num_ranks}-{synced}")

    def turn() -> dict[str, Any]:
        if seat.rank == 0:
            settle(out)
        if parallel:
            dist.barrier()
        with Peak() as peak:
            start = time.perf_counter()
            model.save_pretrained(out)
            if synced and not parallel:
                subprocess.run(["sync", "-f", out], check=True)
            seconds = time.perf_counter() - start
        told = {"seconds": seconds, "peaks": from_all(peak.bytes, seat)}
        if seat.rank == 0:
            told["crc"] = subprocess.run(
                ["cksum"], stdin=(out / "model.safetensors").open(), capture_output=True, check=True
            ).stdout
            shutil.rmtree(out)
        return told

    return turn


def row(name: str, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What is told of a contestant, the first turn left out."""
    seconds, theirs = (
        [told["seconds"] for told in results[one][1:]] for one in (name, "transformers")
    )
    against = ratio(seconds, theirs)
    peaks = [max(of) for of in zip(*(told["peaks"] for told in results[name][1:]), strict=True)]
    memory = ", ".join(f"{peak / MB:.0f}" for peak in peaks)
    print(
        f"{name:24}{statistics.median(seconds):8.2f} s{against['median']:8.2f} of Transformers' "
        f"time, RssAnon {memory} MB"
    )
    return {"seconds": seconds, "ratio": against, "peak RssAnon by rank": peaks}


if __name__ == "__main__":
    main()
