"""Contestants: groups of processes that do the same work, told when to, within one run.

What else the machine does hits all alike when they take turns, so ratios repeat where seconds do
not.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Seat:
    """One process's place.

    Attributes:
        rank: of how many.
        num_ranks: 1 for Transformers alone.
        threads: that this process may use.
        rendezvous: a file where the ranks meet.
    """

    rank: int
    num_ranks: int
    threads: int
    rendezvous: str

    def take(self) -> None:
        """Join the other ranks."""
        torch.set_num_threads(self.threads)
        if self.num_ranks == 1:
            return
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{self.rendezvous}",
            rank=self.rank,
            world_size=self.num_ranks,
        )


#: sets up one process and returns what it does at each turn; the result is rank 0's.
Work = Callable[[Seat], Callable[[], Any]]


class AbsentError(Exception):
    """A contestant that cannot take part."""


class Contestant:
    """Processes that do one work; a context manager.

    Args:
        work: a function that can be pickled.
        ranks: how many processes.
        threads: cores that they may use together.
        folder: where they meet.

    Attributes:
        cpu_seconds: that all ranks together took, by turn.
    """

    def __init__(self, work: Work, ranks: int, threads: int, folder: str) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        self.cpu_seconds: list[float] = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            seat = Seat(rank, ranks, max(threads // ranks, 1), f"{folder}/{id(self)}")
            process = context.Process(target=_serve, args=(theirs, work, seat), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Contestant:
        try:
            reasons = {pipe.recv() for pipe in self.pipes} - {None}
        except EOFError:
            for process in self.processes:
                process.join(timeout=5)
            reasons = {f"it died, exit codes {[process.exitcode for process in self.processes]}"}
        if reasons:
            for process in self.processes:
                process.kill()
            raise AbsentError("; ".join(sorted(reasons)))
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(False)
            process.join(timeout=10)

    def turn(self) -> tuple[float, Any]:
        """Seconds until the slowest rank is done, and what rank 0 returned."""
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(True)
        results = [pipe.recv() for pipe in self.pipes]
        seconds = time.perf_counter() - start
        self.cpu_seconds.append(sum(cpu for _, cpu in results))
        return seconds, results[0][0]


def _serve(pipe: Any, work: Work, seat: Seat) -> None:
    seat.take()
    try:
        turn = work(seat)
    except AbsentError as reason:
        pipe.send(str(reason))
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        raise
    pipe.send(None)
    while pipe.recv():
        start = time.process_time()
        result = turn()
        pipe.send((result, time.process_time() - start))


def present(
    stack: ExitStack, ways: Mapping[str, Callable[[], Contestant]]
) -> dict[str, Contestant]:
    """Those who can take part, entered; why the others cannot is printed."""
    contestants = {}
    for name, way in ways.items():
        try:
            contestants[name] = stack.enter_context(way())
        except AbsentError as reason:
            print(f"{name}: not shown, {reason}")
    return contestants


def alternate(
    contestants: Mapping[str, Contestant], warmup: int, turns: int
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds (after warm-up) and results of every turn, the contestants one after the other."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    for turn in tqdm(range(warmup + turns), desc="alternating"):
        for name, contestant in contestants.items():
            seconds, result = contestant.turn()
            results[name].append(result)
            if turn >= warmup:
                times[name].append(seconds)
    return times, results


def require_equal(results: Mapping[str, Iterable[float]], tolerance: float) -> None:
    """Exit unless all contestants computed the same numbers."""
    worst = max(max(turn) - min(turn) for turn in zip(*results.values(), strict=True))
    if worst > tolerance:
        raise SystemExit(f"losses differ by {worst:.2e}, required: {tolerance:.0e}")


def ratio(ours: Iterable[float], theirs: Iterable[float]) -> dict[str, Any]:
    """Median and quartiles of the pairwise ratios, and the ratio of the best."""
    ours, theirs = list(ours), list(theirs)
    low, middle, high = statistics.quantiles(
        [one / other for one, other in zip(ours, theirs, strict=True)], n=4
    )
    return {"median": middle, "quartiles": [low, high], "of best": min(ours) / min(theirs)}


def record(name: str, result: Mapping[str, Any]) -> None:
    """Write a result beside the versions that it was measured with."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{datetime.now(UTC):%Y%m}.json"
    dated = {**result, "versions": versions(), "date": datetime.now(UTC).isoformat("T", "seconds")}
    path.write_text(json.dumps(dated, indent=1) + "\n")
    print(f"written to {path}")


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    import transformers

    import tensorpar

    return {
        "tensorpar": tensorpar.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {mp.cpu_count()} cores",
    }
