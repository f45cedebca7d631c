"""Worker processes that stand for ranks, started once per session; a job costs milliseconds.

A world of n is made of the first n workers, over gloo and a `file://` rendezvous; its process group
is kept for as long as jobs ask for the same n. A job that fails or takes too long ends all workers,
and the next job starts new ones: nothing of it can leak.

Only what pickle carries travels: functions by their module's path, arguments and results.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

START_SECONDS = 180.0
#: how long the others may go on when a rank has failed; often they wait for it in a collective.
GRACE_SECONDS = 3.0
COLLECTIVE_TIMEOUT = timedelta(seconds=60)
#: after how many worlds workers are exchanged; gloo's threads outlive each.
MOST_WORLDS = 20

Answer = tuple[str, Any]


@dataclass(frozen=True)
class Job:
    """One call on every rank of a world.

    Attributes:
        fn: a top-level function.
        args: its arguments.
        config: of `tensorpar.init`; None leaves the process uninitialised.
        size: the world's size.
        rendezvous: a fresh file if the process group must be made anew, else None.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    config: dict[str, Any] | None
    size: int
    rendezvous: str | None


@dataclass(frozen=True)
class Ranks:
    """A world of `size` ranks of a pool, with the configuration they are initialised with."""

    pool: Pool
    size: int
    config: dict[str, Any] | None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """`fn(*args)` on every rank; the results in the order of the ranks.

        Raises:
            AssertionError: a rank raised, died or did not end in time; with what each rank did.
        """
        answers = self.pool.run(self, fn, args, timeout)
        if all(kind == "result" for kind, _ in answers):
            return [result for _, result in answers]
        told = "\n".join(f"--- rank {rank} {kind}\n{x}" for rank, (kind, x) in enumerate(answers))
        raise AssertionError(f"{fn.__qualname__} failed in a world of {self.size}\n{told}")


class Pool:
    """The session's workers; call it for a world: `pool(2).run(fn, ...)`."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="tensorpar-ranks-"))
        self._workers: list[tuple[Any, Any]] = []
        self._world: int | None = None
        self._num_worlds = self._num_held = 0

    def __call__(self, size: int, *, init: bool = True, **config: Any) -> Ranks:
        """A world of `size` ranks.

        Args:
            size: how many ranks.
            init: whether `tensorpar.init` is called before a job.
            config: its configuration; by default all ranks share one model and one batch.
        """
        config = {"tensor_parallel_degree": size, "prescaled_batch": True, **config}
        return Ranks(self, size, config if init else None)

    def run(
        self, ranks: Ranks, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Answer]:
        """What every rank answers to a job; workers that did not answer well are gone."""
        answers: list[Answer] = []
        if self._num_held >= MOST_WORLDS:
            self.kill()
        try:
            self._start(ranks.size)
            job = Job(fn, args, ranks.config, ranks.size, self._new_rendezvous(ranks.size))
            message = pickle.dumps(job)
            for _, connection in self._workers[: ranks.size]:
                connection.send_bytes(message)
            answers = self._collect(ranks.size, timeout)
        finally:
            if not answers or any(kind != "result" for kind, _ in answers):
                self.kill()
        if ranks.config is None:
            # such a job may have done anything to the process group, and torch remembers by a
            # mesh's layout groups that are gone by then
            self.kill()
        return answers

    def kill(self) -> None:
        """End the workers; the next job starts new ones."""
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers, self._world, self._num_held = [], None, 0

    def close(self) -> None:
        """End the workers and delete their files."""
        self.kill()
        shutil.rmtree(self._folder)

    def _start(self, size: int) -> None:
        new = range(len(self._workers), size)
        for rank in new:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_work, args=(rank, theirs, self._stack_file(rank)), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for rank in new:
            _, connection = self._workers[rank]
            ready = connection.poll(START_SECONDS) and _receive(connection)[0] == "result"
            assert ready, f"worker {rank} did not start within {START_SECONDS:g} s"

    def _new_rendezvous(self, size: int) -> str | None:
        if self._world == size:
            return None
        self._world = size
        self._num_worlds, self._num_held = self._num_worlds + 1, self._num_held + 1
        return str(self._folder / f"rendezvous-{self._num_worlds}")

    def _collect(self, size: int, timeout: float) -> list[Answer]:
        waiting = {self._workers[rank][1]: rank for rank in range(size)}
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                answer = answers[waiting.pop(connection)] = _receive(connection)
                if answer[0] != "result":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank in waiting.values():
            answers[rank] = f"was given up after {timeout:g} s or less, at", self._stack(rank)
        return [answers[rank] for rank in range(size)]

    def _stack(self, rank: int) -> str:
        """Where a silent worker is, as it writes down itself when signalled."""
        with suppress(ProcessLookupError):
            os.kill(self._workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self._stack_file(rank).read_text()

    def _stack_file(self, rank: int) -> Path:
        return self._folder / f"stack-{rank}"


class Pools:
    """A pool for each size, so that worlds of different sizes last beside each other."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __call__(self, size: int, **options: Any) -> Ranks:
        """As a pool's."""
        if size not in self._pools:
            self._pools[size] = Pool()
        return self._pools[size](size, **options)

    def close(self) -> None:
        """End all workers."""
        for pool in self._pools.values():
            pool.close()


def _receive(connection: Any) -> Answer:
    try:
        answer: Answer = pickle.loads(connection.recv_bytes())
    except EOFError:
        return "died", ""
    return answer


def _work(rank: int, connection: Any, stack_file: Path) -> None:
    """A worker's life: one job after another, until the other end of the pipe closes."""
    with stack_file.open("w") as file, suppress(EOFError):
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        import torch

        torch.set_num_threads(1)
        worlds: dict[str, Any] = {}
        connection.send_bytes(pickle.dumps(("result", "ready")))
        while True:
            message = connection.recv_bytes()
            try:
                answer = pickle.dumps(("result", _do(rank, message, worlds)))
            except BaseException:  # the parent is told whatever it was, and ends this process
                answer = pickle.dumps(("raised", traceback.format_exc()))
            connection.send_bytes(answer)


def _do(rank: int, message: bytes, worlds: dict[str, Any]) -> Any:
    """One job, from a clean state to a clean state. `worlds` keeps meshes while the group lives."""
    import torch
    import torch.distributed as dist

    import tensorpar
    from tensorpar import mesh

    job: Job = pickle.loads(message)
    if job.rendezvous is not None:
        worlds.clear()
        tensorpar.shutdown()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.rendezvous}",
            rank=rank,
            world_size=job.size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    key = repr(job.config)
    mesh._world = worlds.get(key)
    if job.config is not None and mesh._world is None:
        tensorpar.init(job.config)
        worlds[key] = mesh._world
    try:
        return job.fn(*job.args)
    finally:
        mesh._world = None
