"""Steps of a collective call that every rank takes alone: an error on one is an error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_all_ranks(call: str, step: Callable[[], T]) -> list[T]:
    """What `step` returns on each rank; collective over the world.

    Args:
        call: the name of the public call, for the message.
        step: must not communicate, unless it does so on every rank before it can fail.

    Raises:
        Exception: what `step` raised here; or, if it raised on other ranks only, an OSError or
            ValueError, as there, or RuntimeError that names them.
    """
    error: Exception | None = None
    answer: tuple[str, str, T | None] = ("", "", None)
    try:
        answer = ("", "", step())
    except Exception as raised:
        error = raised
        answer = (_kind(raised), str(raised) or repr(raised), None)
    answers = [answer] * dist.get_world_size()
    if len(answers) > 1:
        dist.all_gather_object(answers, answer)
    if error is not None:
        raise error
    failed = [(rank, kind, text) for rank, (kind, text, _) in enumerate(answers) if kind]
    if failed:
        told = "; ".join(f"rank {rank}: {text}" for rank, _, text in failed)
        raise _KINDS[failed[0][1]](f"{call} failed on other ranks, and here for that: {told}")
    return [result for _, _, result in answers]  # type: ignore[misc]  # none failed


_KINDS: dict[str, type[Exception]] = {
    "OSError": OSError,
    "ValueError": ValueError,
    "RuntimeError": RuntimeError,
}


def _kind(error: Exception) -> str:
    kinds = (name for name, kind in _KINDS.items() if isinstance(error, kind))
    return next(kinds, "RuntimeError")
