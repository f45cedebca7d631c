"""What `torch.compile` leaves alone: checks that read values, random states, doors of a model.

A graph ends where such a function is called and another begins after it; within it Python runs as
it always does. Layers and their collectives are traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

# `torch.compiler.disable` would import the compiler now, which takes seconds; this when called
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def runs_uncompiled(function: F) -> F:
    """Decorator: a graph break, within which Python runs as it always does."""
    disabled: F = _disable_dynamo(function)  # type: ignore[assignment]
    return disabled


def stays_uncompiled(reason: str) -> None:
    """Let the frame that is being traced, from its last graph break on, run as it always does.

    Functions that it calls may still be compiled.
    """
    if torch.compiler.is_compiling():
        torch._dynamo.skip_frame(reason)
