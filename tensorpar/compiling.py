"""What `torch.compile` leaves alone: checks that read values, random states, doors of a model.

A graph ends where such a function is called and another begins after it; within it Python runs as
it always does. Layers and their collectives are traced. Nothing here or elsewhere adds a collective
or leaves one out under the compiler, so ranks may be compiled differently and still meet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

# `torch.compiler.disable` would import the compiler now, which takes seconds; this when called
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def runs_uncompiled(function: F) -> F:
    """Decorator: a graph break, within which Python runs as it always does."""
    disabled: Any = _disable_dynamo(function)
    # what `torch.compiler.disable(reason=...)` sets: told to who asks for one graph
    disabled._torchdynamo_disable = True
    disabled._torchdynamo_disable_msg = (
        f"tensorpar runs {function.__qualname__} outside of graphs, since it compares ranks, reads "
        "values or sets random states; compile with fullgraph=False"
    )
    return disabled


@partial(_disable_dynamo, recursive=False)
def leave_compiler() -> None:
    """From here on, to the end of the compiled function, Python runs as it always does.

    A graph break ends with the call that makes it; this one lasts. Without the compiler it does
    nothing, and what called the compiled function finds the compiler as it was.
    """
    set_eval_frame(None)
