"""What the forward under way must know of its surroundings, where `torch.compile` can follow it.

A `ContextVar` would be the usual tool, but the compiler traces none: each would end a graph, and
these are read in every layer. It follows plain attributes, in reading and in writing. The price is
that they belong to the process and not to a thread; so do collectives, whose order is common to all
ranks, which is why two threads cannot run forwards of parallel models at once in any case.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Current(Generic[T]):
    """One value, used as a `ContextVar` is.

    Args:
        default: what it is until it is set.
    """

    def __init__(self, default: T) -> None:
        self._value = default

    def get(self) -> T:
        """The value."""
        return self._value

    def set(self, value: T) -> T:
        """Change it; returns what it was, for `reset`."""
        before, self._value = self._value, value
        return before

    def reset(self, before: T) -> None:
        """Back to what it was before `set`."""
        self._value = before
