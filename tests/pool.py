"""Worker processes that stand for ranks, a world of each size; a job costs milliseconds.

A world's workers and its process group, over gloo and a `file://` rendezvous, last from job to job.
A job that fails or takes too long ends them, and the next job starts new ones: nothing of it can
leak. New ones are cheap: they are forked from a server that has imported torch, Transformers and
tensorpar, and that has started no thread and computed nothing.

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
#: what the server imports: with what these import, nearly all that jobs need.
PRELOADED = ["transformers.models.gpt2.modeling_gpt2", "tests.conformance.families"]

Answer = tuple[str, Any]


@dataclass(frozen=True)
class Job:
    """One call on every rank of a world.

    Attributes:
        fn: a top-level function.
        args: its arguments.
        config: of `tensorpar.init`; None leaves the process uninitialised.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    config: dict[str, Any] | None


@dataclass(frozen=True)
class Ranks:
    """A world, with the configuration that its ranks are initialised with."""

    world: World
    config: dict[str, Any] | None

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """`fn(*args)` on every rank; the results in the order of the ranks.

        Raises:
            AssertionError: a rank raised, died or did not end in time; with what each rank did.
        """
        answers = self.world.run(Job(fn, args, self.config), timeout)
        if all(kind == "result" for kind, _ in answers):
            return [result for _, result in answers]
        told = "\n".join(f"--- rank {rank} {kind}\n{x}" for rank, (kind, x) in enumerate(answers))
        raise AssertionError(f"{fn.__qualname__} failed in a world of {self.world.size}\n{told}")


class World:
    """The workers of a process group; started when there is a job for them."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._workers: list[tuple[Any, Any]] = []
        self._num_starts = 0

    def run(self, job: Job, timeout: float) -> list[Answer]:
        """What every rank answers to a job; workers that did not answer well are gone."""
        answers: list[Answer] = []
        try:
            if not self._workers:
                self._start()
            message = pickle.dumps(job)
            for _, connection in self._workers:
                connection.send_bytes(message)
            answers = self._collect(timeout)
        finally:
            if not answers or any(kind != "result" for kind, _ in answers):
                self.kill()
        if job.config is None:
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
        self._workers = []

    def _start(self) -> None:
        self._num_starts += 1
        rendezvous = self._folder / f"rendezvous-{self.size}-{self._num_starts}"
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            arguments = rank, self.size, rendezvous, theirs, self._stack_file(rank)
            process = self._context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for rank, (_, connection) in enumerate(self._workers):
            answer = connection.poll(START_SECONDS) and _receive(connection)
            assert answer, f"worker {rank} did not start: {self._death(rank)}"

    def _collect(self, timeout: float) -> list[Answer]:
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                rank = waiting.pop(connection)
                answer = answers[rank] = _receive(connection) or self._death(rank)
                if answer[0] != "result":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank in waiting.values():
            answers[rank] = f"was given up after {timeout:g} s or less, at", self._stack(rank)
        return [answers[rank] for rank in range(self.size)]

    def _death(self, rank: int) -> Answer:
        """How a worker ended whose pipe closed: its exit code, and where a fatal signal met it."""
        process = self._workers[rank][0]
        process.join(GRACE_SECONDS)
        return f"died, exit code {process.exitcode}, at", self._stack_file(rank).read_text()

    def _stack(self, rank: int) -> str:
        """Where a silent worker is, as it writes down itself when signalled."""
        with suppress(ProcessLookupError):
            os.kill(self._workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self._stack_file(rank).read_text()

    def _stack_file(self, rank: int) -> Path:
        return self._folder / f"stack-{self.size}-{rank}"


class Pool:
    """Worlds of all sizes, which last beside each other: `pool(2).run(fn, ...)`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tensorpar-ranks-"))
        self._worlds: dict[int, World] = {}

    def __call__(self, size: int, *, init: bool = True, **config: Any) -> Ranks:
        """A world of `size` ranks.

        Args:
            size: how many ranks.
            init: whether `tensorpar.init` is called before a job.
            config: its configuration; by default all ranks share one model and one batch.
        """
        config = {"tensor_parallel_degree": size, "prescaled_batch": True, **config}
        world = self._worlds.setdefault(size, World(size, self._folder))
        return Ranks(world, config if init else None)

    def close(self) -> None:
        """End all workers and delete their files."""
        for world in self._worlds.values():
            world.kill()
        shutil.rmtree(self._folder)


def _receive(connection: Any) -> Answer | None:
    """What a worker answers; None when it has died."""
    try:
        answer: Answer = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    return answer


def _work(rank: int, size: int, rendezvous: Path, connection: Any, stack_file: Path) -> None:
    """A worker's life: one job after another, until the other end of the pipe closes."""
    with stack_file.open("w") as file, suppress(EOFError):
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        faulthandler.enable(file)
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        meshes: dict[str, Any] = {}
        connection.send_bytes(pickle.dumps(("result", "ready")))
        while True:
            message = connection.recv_bytes()
            try:
                answer = pickle.dumps(("result", _do(message, meshes)))
            except BaseException:  # the parent is told whatever it was, and ends this process
                answer = pickle.dumps(("raised", traceback.format_exc()))
            connection.send_bytes(answer)


def _do(message: bytes, meshes: dict[str, Any]) -> Any:
    """One job, from a clean state to a clean state; `meshes` keeps those of configurations."""
    import torch

    import tensorpar
    from tensorpar import mesh

    job: Job = pickle.loads(message)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    key = repr(job.config)
    mesh._world = meshes.get(key)
    if job.config is not None and mesh._world is None:
        tensorpar.init(job.config)
        meshes[key] = mesh._world
    try:
        return job.fn(*job.args)
    finally:
        mesh._world = None
