"""Meeting before a collective call that one rank might never make."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_POLL_SECONDS = 0.01
_calls: Counter[str] = Counter()


def rendezvous(call: str, timeout: timedelta) -> int:
    """Wait until all ranks of the world make this call; returns this rank.

    Through the process group's key-value store, which works with ranks absent; a collective does
    not.

    Args:
        call: the name of the public call, for the message.
        timeout: how long to wait for the last rank.

    Raises:
        TimeoutError: naming the call and the absent ranks, on every rank that made it.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return rank
    store = _get_default_store()
    prefix = f"tensorpar/{call}/{_calls[call]}"
    _calls[call] += 1
    keys = [f"{prefix}/{other}" for other in range(world_size)]
    store.set(keys[rank], "here")
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check(keys) or store.check([f"{prefix}/given-up"]):
        if time.monotonic() > deadline or store.check([f"{prefix}/given-up"]):
            store.set(f"{prefix}/given-up", "")
            absent = [other for other in range(world_size) if not store.check([keys[other]])]
            raise TimeoutError(
                f"{call} was not called by ranks {absent} within {timeout.total_seconds():g} s; it "
                "is collective: call it on every rank, and guard only what follows it by the rank"
            )
        time.sleep(_POLL_SECONDS)
    return rank
