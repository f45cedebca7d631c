"""Cross entropy on logits whose vocabulary is sharded: the logits are never gathered.

    x_NV   this rank's logits (V = vocabulary / n)      t_N  targets, the same on all ranks
    own_N, part_N = max_V(x), sum_V(exp(x - own))       (local)
    max_N  = all_reduce_max(own)
    [sum_N, pick_N] = all_reduce([part * exp(own - max),  x[t] - max  where t is here, else 0])
    loss_N = log(sum_N) - pick_N
    dgrad    dx_NV = (exp(x - max) / sum - onehot(t)) * dloss_N    (local)

No logarithm is subtracted from logits, whose rounding would be the same error in a whole row.
Two small all-reduces forward, none backward (Shoeybi et al., "Megatron-LM", 2019, section 3). A
second derivative is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from tensorpar.collectives import all_reduce
from tensorpar.parameters import shard_dim
from tensorpar.partition import chunk_bounds

#: a block of this many logits is reduced at a time.
_BLOCK_ELEMENTS = 1 << 19


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NV: torch.Tensor, target_N: torch.Tensor, start: int, mesh: DeviceMesh
    ) -> torch.Tensor:
        own_N, part_N = _max_and_sum(x_NV)
        max_N = all_reduce(own_N, mesh, dist.ReduceOp.MAX)
        here_N = (target_N >= start) & (target_N < start + x_NV.shape[1])
        column_N = (target_N - start).masked_fill(~here_N, 0)
        sums_2N = torch.stack([part_N * torch.exp(own_N - max_N), torch.zeros_like(own_N)])
        if x_NV.shape[1]:
            picked_N = x_NV.gather(1, column_N[:, None])[:, 0] - max_N
            sums_2N[1] = picked_N.masked_fill(~here_N, 0.0)
        sum_N, picked_N = all_reduce(sums_2N, mesh)
        ctx.save_for_backward(x_NV, max_N, sum_N, column_N, here_N)
        return (sum_N.log() - picked_N).to(x_NV.dtype)

    @staticmethod
    def backward(ctx: Any, dloss_N: torch.Tensor) -> Any:
        return _Gradient.apply(dloss_N, *ctx.saved_tensors), None, None, None


class _Gradient(torch.autograd.Function):
    """A function, so that nobody takes it for a constant who differentiates it again."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004
        dloss_N: torch.Tensor,
        x_NV: torch.Tensor,
        max_N: torch.Tensor,
        sum_N: torch.Tensor,
        column_N: torch.Tensor,
        here_N: torch.Tensor,
    ) -> torch.Tensor:
        dx_NV, scale_N = torch.empty_like(x_NV), dloss_N / sum_N
        blocks = (whole.split(_rows_at_once(x_NV)) for whole in (dx_NV, x_NV, max_N, scale_N))
        for dx, x, most, scale in zip(*blocks, strict=True):
            dx.copy_((x - most[:, None]).exp_().mul_(scale[:, None]))
        if x_NV.shape[1]:
            dx_NV.scatter_add_(1, column_N[:, None], (-dloss_N * here_N)[:, None])
        return dx_NV

    @staticmethod
    def backward(ctx: Any, *_: object) -> Any:  # noqa: ARG004
        raise RuntimeError(
            "second derivative of a loss on a sharded vocabulary, required: the first only; call "
            "the model without labels, whose logits are whole, and compute the loss from them"
        )


def _max_and_sum(x_NV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row, and the sum of `exp(x - largest)`; at least in float32.

    Without columns, or where all are -inf: -inf and 0. In row blocks, whose temporaries stay in
    cache.
    """
    dtype = torch.promote_types(x_NV.dtype, torch.float32)
    if x_NV.shape[1] == 0:
        own_N = x_NV.new_full(x_NV.shape[:1], -torch.inf, dtype=dtype)
        return own_N, torch.zeros_like(own_N)
    own, part = [], []
    for block in x_NV.split(_rows_at_once(x_NV)):
        own.append(block.amax(1).to(dtype))
        finite = own[-1].masked_fill(own[-1] == -torch.inf, 0.0)
        part.append((block - finite[:, None]).exp_().sum(1))
    return torch.cat(own), torch.cat(part)


def _rows_at_once(x_NV: torch.Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS // max(1, x_NV.shape[1]))


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    vocab_size: int,
    mesh: DeviceMesh,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy` on this rank's columns of the logits.

    Args:
        logits: `[N, this rank's tokens]`, plain; the result has its dtype.
        target: int64 `[N]`, the same on all ranks.
        vocab_size: global number of tokens; need not divide.
        mesh: the tp mesh over which the vocabulary is sharded.
        ignore_index: targets of this value count for nothing.
        reduction: `"mean"` over the targets that count (nan if none does), `"sum"` or `"none"`.

    Raises:
        IndexError: on the CPU, a target that counts is outside `range(vocab_size)`.
        ValueError: `reduction` is none of the three.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction = {reduction!r}, required: 'mean', 'sum' or 'none'")
    ignored = target == ignore_index
    if target.device.type == "cpu":
        outside = ~ignored & ((target < 0) | (target >= vocab_size))
        if bool(outside.any()):
            raise IndexError(
                f"targets {target[outside].unique().tolist()}, required: in [0, {vocab_size}) or "
                f"ignore_index = {ignore_index}"
            )
    start, _ = chunk_bounds(vocab_size, mesh.size(), mesh.get_local_rank())
    losses = _VocabParallelCrossEntropy.apply(
        logits, target.masked_fill(ignored, 0), start, mesh
    ).masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (~ignored).sum()


class _AnswerCrossEntropy(TorchFunctionMode):
    """Answers `F.cross_entropy` where its logits are sharded on their last or their class dim."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.cross_entropy and _is_vocab_sharded(args, kwargs or {}):
            return _cross_entropy(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_vocab_sharded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    logits = args[0] if args else kwargs.get("input")
    return isinstance(logits, DTensor) and shard_dim(logits) in (1, logits.ndim - 1)


def _cross_entropy(
    input: DTensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`F.cross_entropy` for a DTensor `[N, vocabulary]`; rarer forms gather the logits first."""
    rare = weight is not None or label_smoothing or target.is_floating_point() or input.ndim != 2
    if rare or size_average is not None or reduce is not None:
        return F.cross_entropy(
            input.full_tensor(),
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
        )
    return vocab_parallel_cross_entropy(
        input.to_local(),
        target,
        vocab_size=input.shape[1],
        mesh=input.device_mesh,
        ignore_index=ignore_index,
        reduction=reduction,
    )


class ShardedLoss:
    """Context of a forward that computes its loss: heads keep their logits sharded.

    The first head that asks opens the mode under which `F.cross_entropy` takes such logits, so the
    layers before it run without. The loss needs nothing of this context in backward.
    """

    def __init__(self) -> None:
        self._mode: _AnswerCrossEntropy | None = None

    def __enter__(self) -> ShardedLoss:
        self._token = _active_loss.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _active_loss.reset(self._token)
        if self._mode is not None:
            self._mode.__exit__(*exc)

    def answer_cross_entropy(self) -> None:
        """From here to the end of the forward, take the cross entropy of sharded logits."""
        if self._mode is None:
            self._mode = _AnswerCrossEntropy()
            self._mode.__enter__()


_active_loss: ContextVar[ShardedLoss | None] = ContextVar("active_loss", default=None)


def loss_on_shards() -> bool:
    """For a head: whether the model now running computes its loss from sharded logits."""
    loss = _active_loss.get()
    if loss is None:
        return False
    loss.answer_cross_entropy()
    return True
