"""`tensorpar translate` against `cp` and `sync`: a GPT-J shape in bf16, to tp 4 and back.

Both contestants alternate within one run, so that what else the machine does hits both alike; what
ours wrote is compared with what it read before any time is believed. Memory is RssAnon, sampled
all the time, above its value after imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from contest import record
from peak_memory import anonymous_bytes
from tqdm import tqdm

from checkpoints.folders import affordable, file_system, make_model, settle

MB = 1 << 20
#: of the model, that the naive way holds at once, and some room.
NAIVE_COPIES = 1.6


def measure(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-translate-") as name:
        folder = Path(name)
        size = affordable(args.size, folder)
        source = folder / "hf"
        largest = make_model(source, size)
        num_bytes = sum(file.stat().st_size for file in source.iterdir())
        print(f"{num_bytes / 1e9:.2f} GB on {file_system(folder)}, largest tensor {largest:,} B")
        sharded = folder / f"tp{args.tp}"
        translate(source, sharded, "tensorpar", args.tp)  # the source of the way back
        verify(source, sharded)
        rows = {
            f"hf to tp {args.tp}": alternate(
                args.turns, source, folder / "out", "tensorpar", args.tp
            ),
            f"tp {args.tp} to hf": alternate(args.turns, sharded, folder / "out", "hf", None),
        }
        naive = naively(source, size, args.tp)
        model = {
            "billions": size,
            "bytes": num_bytes,
            "largest": largest,
            "file system": file_system(folder),
        }
    report(args, rows, naive, model)


def alternate(
    pairs: int, source: Path, out: Path, layout: str, tp: int | None
) -> list[dict[str, Any]]:
    """Seconds of both contestants, taking turns, and our memory."""
    runs = []
    for _ in tqdm(range(pairs), desc=f"{source.name} to {layout}"):
        copied = copy(source, out)
        ours = translate(source, out, layout, tp)
        runs.append({"copy seconds": copied, **ours, "ratio": copied / ours["seconds"]})
    return runs


def copy(source: Path, out: Path) -> float:
    """`cp -r --reflink=never SRC DST && sync -f DST`."""
    settle(out)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, out], check=True)
    subprocess.run(["sync", "-f", out], check=True)
    seconds = time.perf_counter() - start
    settle(out)
    return seconds


def translate(source: Path, out: Path, layout: str, tp: int | None) -> dict[str, Any]:
    """Ours in a process of its own, with fsync and rename."""
    settle(out)
    command = ["translate", str(source), str(out), "--to", layout]
    command += [] if tp is None else ["--tp", str(tp)]
    start = time.perf_counter()
    result = in_process(run_command, *command)
    result["seconds with start and imports"] = time.perf_counter() - start
    return result


def verify(source: Path, written: Path) -> None:
    told = in_process(run_command, "verify", str(source), str(written))
    if told["result"] != 0:
        raise SystemExit("what was written is not what was read")


def run_command(*arguments: str) -> int:
    from tensorpar.translators.command import main as command

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return command(arguments)


def naively(source: Path, size: float, tp: int) -> dict[str, Any]:
    """What the naive way takes; with a smaller model where this machine's memory asks for one."""
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(told["MemAvailable"].split()[0]) * 1024
    possible = available / (2e9 * NAIVE_COPIES)
    if size > possible:
        size, source = int(possible * 10) / 10, source.with_name("smaller")
        print(f"load all, translate, save all: {available / 1e9:.0f} GB of memory, size {size}")
        make_model(source, size)
    out = source.with_name("naive")
    return {"billions": size, **in_process(naive_way, str(source), str(out), tp)}


def naive_way(source: str, out: str, tp: int) -> None:
    """Load all, translate, save all."""
    from safetensors.torch import load_file, save_file

    from tensorpar.translators import from_hf, split

    config = json.loads((Path(source) / "config.json").read_text())
    tensors = load_file(Path(source) / "model.safetensors")
    # what is mapped from a file is not counted; whoever translates by hand copies
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    Path(out).mkdir()
    for rank, part in enumerate(split(from_hf(tensors, config), config, tp)):
        own = {name: tensor.contiguous() for name, tensor in part.items()}
        save_file(own, Path(out) / f"{rank}.safetensors")
    subprocess.run(["sync", "-f", out], check=True)
    shutil.rmtree(out)


def in_process(task: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What `task` returns in a new process, its seconds and its memory, imports apart."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(theirs, task, arguments))
    process.start()
    theirs.close()
    result: dict[str, Any] = ours.recv()
    process.join()
    return result


def measured(pipe: Any, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import tensorpar.translators.command  # noqa: F401

    base = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    result = task(*arguments)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    pipe.send({"result": result, "seconds": seconds, "memory": peak - base})


def report(
    args: argparse.Namespace,
    rows: dict[str, list[dict[str, Any]]],
    naive: dict[str, Any],
    model: dict[str, Any],
) -> None:
    limit = 2 * model["largest"] + 256 * MB
    titles = f"{'cp GB/s':>9}{'ours GB/s':>11}{'ratio':>8}{'range':>14}{'RssAnon':>10}"
    print(f"\n{'direction':16}{titles}")
    summary = {}
    for name, runs in rows.items():
        ratios = [run["ratio"] for run in runs]
        rates = [
            model["bytes"] / 1e9 / statistics.median(run[key] for run in runs)
            for key in ("copy seconds", "seconds")
        ]
        memory = max(run["memory"] for run in runs)
        summary[name] = {
            "ratio": statistics.median(ratios),
            "GB per second": dict(zip(("cp", "ours"), rates, strict=True)),
            "peak RssAnon": memory,
        }
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"{name:16}{rates[0]:9.2f}{rates[1]:11.2f}{statistics.median(ratios):8.2f}{spread:>14}"
            f"{memory / MB:7.0f} MB"
        )
    naive["memory ratio"] = naive["memory"] / max(row["peak RssAnon"] for row in summary.values())
    told = f"{naive['seconds']:.1f} s, RssAnon {naive['memory'] / MB:.0f} MB"
    print(
        f"hf to tp {args.tp}, load all, translate, save all, {naive['billions']} billions: {told}, "
        f"{naive['memory ratio']:.0f} times ours"
    )
    print(f"limit of RssAnon: 2 x the largest tensor + 256 MB = {limit / MB:.0f} MB")
    result = {
        "summary": summary,
        "limit of RssAnon": limit,
        "runs": rows,
        "load all, translate, save all": naive,
        "model": model,
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }
    record("translate_cpu", result)
