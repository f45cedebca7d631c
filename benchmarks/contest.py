"""Contestants: groups of processes that do the same work, told when to, within one run.

What else the machine does hits all alike when they take turns, so ratios repeat where seconds do
not.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing as mp
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
#: what contestants need, imported once for all of them.
SLOW_IMPORTS = (
    "torch._dynamo",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "tensorpar.nn.huggingface",
)


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

    def from_all(self, value: Any) -> list[Any]:
        """The value of every rank."""
        if self.num_ranks == 1:
            return [value]
        values = [None] * self.num_ranks
        torch.distributed.all_gather_object(values, value)
        return values


#: sets up one process and returns what it does at each turn; the result is rank 0's.
Work = Callable[[Seat], Callable[[], Any]]


_meetings = itertools.count()


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
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["__main__", *SLOW_IMPORTS])
        self.pipes, self.processes = [], []
        self.cpu_seconds: list[float] = []
        # no two contestants', not even one's that has gone: its addresses would be found there
        meeting = f"{folder}/{next(_meetings)}"
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            seat = Seat(rank, ranks, max(threads // ranks, 1), meeting)
            process = context.Process(target=_serve, args=(theirs, work, seat), daemon=True)
            process.start()
            theirs.close()  # or its end would not be noticed
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Contestant:
        if reasons := set(self._answers()) - {None}:
            self._kill()
            raise AbsentError("; ".join(sorted(reasons)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with suppress(BrokenPipeError):  # it has died, which is what `error` says
                pipe.send(False)
            process.join(timeout=10)

    def turn(self) -> tuple[float, Any]:
        """Seconds until the slowest rank is done, and what rank 0 returned.

        Raises:
            AbsentError: a rank died; what it said is on the screen.
        """
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(True)
        results = self._answers()
        seconds = time.perf_counter() - start
        self.cpu_seconds.append(sum(cpu for _, cpu in results))
        return seconds, results[0][0]

    def _answers(self) -> list[Any]:
        """Every rank's, in order; once one has died, the others wait for it and are not waited for.

        Raises:
            AbsentError: one died; the others are ended.
        """
        answers: dict[Any, Any] = {}
        while waiting := [pipe for pipe in self.pipes if pipe not in answers]:
            for pipe in wait(waiting):
                try:
                    answers[pipe] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._kill()
                    codes = [process.exitcode for process in self.processes]
                    raise AbsentError(f"it died, exit codes {codes}") from None
        return [answers[pipe] for pipe in self.pipes]

    def _kill(self) -> None:
        for process in self.processes:
            process.join(timeout=1)  # who failed is to say why
            process.kill()
            process.join()


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
    begun = {name: way() for name, way in ways.items()}  # while one waits, others set up
    for name, contestant in begun.items():
        try:
            contestants[name] = stack.enter_context(contestant)
        except AbsentError as reason:
            print(f"{name}: not shown, {reason}")
    return contestants


def alternate(
    contestants: Mapping[str, Contestant], warmup: int, turns: int
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds (after warm-up) and results of every turn, the contestants one after the other.

    Their order is drawn anew for each turn, since one finds the machine as the one before left it.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    orders = random.Random(0)
    for turn in tqdm(range(warmup + turns), desc="alternating"):
        for name in orders.sample(list(contestants), len(contestants)):
            seconds, result = contestants[name].turn()
            results[name].append(result)
            if turn >= warmup:
                times[name].append(seconds)
    return times, results


def entered(
    stack: ExitStack, entries: Mapping[str, tuple[Work, int]], threads: int, folder: Path
) -> dict[str, Contestant]:
    """Contestants by name, of their work and number of ranks; they end with the stack."""
    return {
        name: stack.enter_context(Contestant(work, ranks, threads, str(folder)))
        for name, (work, ranks) in entries.items()
    }


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
