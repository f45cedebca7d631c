"""Meeting before a collective call that one rank might never make."""

from __future__ import annotations

import time
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

_POLL_SECONDS = 0.01
_ALL_HERE = "all here"
#: per world and call, the round in which this rank meets the others next.
_rounds: WeakKeyDictionary[dist.ProcessGroup, dict[str, int]] = WeakKeyDictionary()


def rendezvous(call: str, timeout: timedelta) -> int:
    """Wait until all ranks of the world make this call; returns this rank.

    Through the process group's key-value store, which works with ranks absent; a collective does
    not. Ranks meet in numbered rounds; one that was absent from a round that the others gave up
    joins them in their next.

    Args:
        call: the name of the public call, for the message.
        timeout: how long to wait for the last rank.

    Raises:
        TimeoutError: naming the call and the absent ranks, on every rank that made it.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return rank
    store, place = _get_default_store(), f"tensorpar/{call}"
    number = _next_round(store, place, call)
    keys = _keys(place, number, world_size)
    store.set(keys[rank], "here")
    verdict = _verdict(store, keys, f"{place}/{number}/verdict", timeout)
    if verdict != _ALL_HERE:
        store.set(f"{place}/round", str(number + 1))
        raise TimeoutError(
            f"{call} was not called by ranks {verdict} within {timeout.total_seconds():g} s; it is "
            "collective: call it on every rank, and guard only what follows it by the rank"
        )
    if rank == 0 and number:  # all are here, so none looks at an earlier round again
        for left in [*_keys(place, number - 1, world_size), f"{place}/{number - 1}/verdict"]:
            store.delete_key(left)
    return rank


def _keys(place: str, number: int, world_size: int) -> list[str]:
    return [f"{place}/{number}/{rank}" for rank in range(world_size)]


def _next_round(store: Store, place: str, call: str) -> int:
    assert dist.group.WORLD is not None
    rounds = _rounds.setdefault(dist.group.WORLD, {})
    first_open = int(store.compare_set(f"{place}/round", "", "0"))
    number = max(rounds.get(call, 0), first_open)
    rounds[call] = number + 1
    return number


def _verdict(store: Store, keys: list[str], key: str, timeout: timedelta) -> str:
    """`_ALL_HERE` or the absent ranks: what the first rank to know says, to all."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        if store.check(keys):
            return store.compare_set(key, "", _ALL_HERE).decode()
        if time.monotonic() > deadline or store.check([key]):
            absent = [rank for rank, present in enumerate(keys) if not store.check([present])]
            return store.compare_set(key, "", str(absent)).decode()
        time.sleep(_POLL_SECONDS)
