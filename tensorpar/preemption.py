"""Leaving in time when the machine is wanted back: a SIGTERM to any rank is known to all of them.

Ranks must save together, so none may act on its own signal: once a step they agree whether one of
them has been told to go.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from tensorpar.mesh import world

logger = logging.getLogger(__name__)


@contextmanager
def preemption(*signals: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Within: `signals` do not end this process; they are remembered, and the ranks agree on them.

    Yields a function to be called by all ranks once a step: whether any rank has been signalled
    since the beginning, the same answer on all. One all-reduce of one integer. The former handlers
    are back at the end. Handlers are for the main thread: in another, this rank only learns of the
    others' signals.

    Args:
        signals: by default SIGTERM, which launchers and schedulers send before they kill.

    Raises:
        RuntimeError: before `init`.
    """
    mesh = world().mesh
    told: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        told.append(number)

    def preempted() -> bool:
        flag = torch.tensor([len(told)], device=mesh.device_type)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    is_main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.signal(number, remember)
        for number in (signals or (signal.SIGTERM,))
        if is_main
    }
    try:
        yield preempted
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python, and cannot be put back from it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
