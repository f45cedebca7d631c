"""A world of any size in one process, whose tensors have shapes and no storage.

torch's fake process group answers "rank 0 of n" and its collectives do nothing; under torch's fake
tensors every operation computes shapes, dtypes and what it saves for backward as on a CPU, down to
the attention kernel that is chosen. The model's own code, with its doors and collectives, runs
there unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from tensorpar import mesh
from tensorpar.hf_masks import rows_of_one_sequence


@contextmanager
def pretended_world(tp: int, dp: int) -> Iterator[None]:
    """Within: this process is rank 0 of `tp` x `dp` ranks, the one that holds the most.

    Shards are dealt out as `torch.chunk` does, the first rank's being the largest of every one.

    Raises:
        RuntimeError: the process is part of a real world.
    """
    if dist.is_initialized() or mesh.is_initialized():
        raise RuntimeError(
            "a process group is initialised, required: a process of its own for a plan; start it "
            "without a launcher"
        )
    # registers the backend
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    dist.init_process_group("fake", store=HashStore(), rank=0, world_size=tp * dp)
    try:
        mesh.init(tensor_parallel_degree=tp, device_type="cpu")
        yield
    finally:
        mesh.shutdown()


class NoStorage:
    """Context in which nothing is allocated; may be entered again, for the same tensors."""

    def __init__(self) -> None:
        # Transformers and this package look up small things they made before
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> NoStorage:
        stack = ExitStack()
        stack.enter_context(rows_of_one_sequence())
        stack.enter_context(self._fake)
        stack.enter_context(_ZeroForUnknown())
        self._stacks.append(stack)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stacks.pop().close()


class _ZeroForUnknown(TorchDispatchMode):
    """A number read from a tensor without values is 0, a truth False.

    Read are: whether tokens are in range, whether a mask hides all from some query, whether ranks
    disagree, and seeds. The answers are those of an ordinary batch.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        return func(*args, **(kwargs or {}))
