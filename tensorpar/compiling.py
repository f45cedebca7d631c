"""What `torch.compile` leaves alone: collectives, and the doors that open and close regions.

A graph ends where one of them is called and another begins after it; what lies between, the maths,
is compiled. Traced, they would be baked into graphs together with the state they read and set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

# `torch.compiler.disable` would import the compiler now, which takes seconds; this when called
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., object])


def runs_uncompiled(function: F) -> F:
    """Decorator: a graph break, within which Python runs as it always does."""
    disabled: F = _disable_dynamo(function)  # type: ignore[assignment]
    return disabled
