"""How often collectives are called."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tensorpar.messages import GATHERING, REDUCING

#: of two ranks that send each other what they have, each counts what it receives.
MESSAGES = {REDUCING: "allreduce_", GATHERING: "allgather_"}


class Collectives(TorchDispatchMode):
    """Counts collective calls by name; unlike `CommDebugMode` it also bears two forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0]
            name = MESSAGES[args[-1]] if name == "recv_" else name
            if name not in ("send", "wait_tensor"):
                self.counts[name] += 1
        return func(*args, **(kwargs or {}))
