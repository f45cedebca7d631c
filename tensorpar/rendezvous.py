"""Meeting before a collective call that one rank might never make."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_POLL_SECONDS = 0.01
#: how often each call was made in a world; a new process group starts anew.
_calls: WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = WeakKeyDictionary()


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
    world, store = dist.group.WORLD, _get_default_store()
    assert world is not None
    calls = _calls.setdefault(world, Counter())
    prefix = f"tensorpar/{call}/{calls[call]}"
    calls[call] += 1
    keys, given_up = [f"{prefix}/{other}" for other in range(world_size)], f"{prefix}/given-up"
    store.set(keys[rank], "here")
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check(keys) or store.check([given_up]):
        if time.monotonic() > deadline and not store.check([given_up]):
            absent = [other for other in range(world_size) if not store.check([keys[other]])]
            store.set(given_up, str(absent))
        if store.check([given_up]):
            raise TimeoutError(
                f"{call} was not called by ranks {store.get(given_up).decode()} within "
                f"{timeout.total_seconds():g} s; it is collective: call it on every rank, and "
                "guard only what follows it by the rank"
            )
        time.sleep(_POLL_SECONDS)
    return rank
