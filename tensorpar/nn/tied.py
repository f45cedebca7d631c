"""One gradient for a weight that embeds tokens and scores them.

Where embedding and head hold the same weight, autograd would make a gradient of its size for each
and a third for their sum, though a batch has touched few rows of the embedding's. Here the head
uses the weight as the embedding has passed it on, so that the head's gradient comes by the
embedding, which adds its rows to it in place:

    W_VH weight, ids_N tokens, x_NH = W[ids], W'_VH = W passed on
    dW = dW' with dx_NH added to its rows ids_N

The sums are those of autograd, bit for bit: first of each token's rows, then with the head's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from tensorpar.parameters import local

#: of the forward under way: parameters that were embedded, each with its local part passed on.
_passed_on: ContextVar[dict[torch.Tensor, torch.Tensor] | None] = ContextVar(
    "passed_on", default=None
)


@contextmanager
def tied_weights() -> Iterator[None]:
    """Within a forward: heads take weights from the embeddings that were called before."""
    token = _passed_on.set({})
    try:
        yield
    finally:
        _passed_on.reset(token)


def embedded(parameter: torch.Tensor, ids: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
    """`F.embedding` of this rank's rows, which are passed on to the heads of this forward.

    Args:
        parameter: `[vocabulary, hidden]`, sharded on dim 0.
        ids: int64, any shape; of this rank's rows.
        padding_idx: a row that gets no gradient from here.
    """
    weight, passed_on = local(parameter), _passed_on.get()
    if passed_on is None or is_dynamo_compiling() or not torch.is_grad_enabled():
        return F.embedding(ids, weight, padding_idx)
    rows, weight = _Embedded.apply(weight, ids, -1 if padding_idx is None else padding_idx)
    passed_on[parameter] = weight
    return rows


def scoring(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a head's weight: those that were passed on, if the same were embedded."""
    passed_on = _passed_on.get() if torch.is_grad_enabled() and not is_dynamo_compiling() else None
    weight = None if passed_on is None else passed_on.get(parameter)
    return local(parameter) if weight is None else weight


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_VH: torch.Tensor, ids: torch.Tensor, padding_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.num_rows, ctx.padding_idx = len(weight_VH), padding_idx
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight_VH), weight_VH.view_as(weight_VH)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor | None, dweight_VH: torch.Tensor | None) -> Any:
        if dx is None:
            return dweight_VH, None, None
        (ids,) = ctx.saved_tensors
        if dweight_VH is None or torch.is_grad_enabled():  # create_graph=True
            dense_VH = _sums(dx, ids, ctx.num_rows, ctx.padding_idx)
            return dense_VH if dweight_VH is None else dweight_VH + dense_VH, None, None
        return _add_rows_(dweight_VH, dx, ids, ctx.padding_idx), None, None


def _sums(dx: torch.Tensor, ids: torch.Tensor, num_rows: int, padding_idx: int) -> torch.Tensor:
    """`[num_rows, hidden]`: of each row's gradients, 0 where `ids` does not have it."""
    return torch.ops.aten.embedding_dense_backward(dx, ids, num_rows, padding_idx, False)


def _add_rows_(
    dweight_VH: torch.Tensor, dx: torch.Tensor, ids: torch.Tensor, padding_idx: int
) -> torch.Tensor:
    """Add to the head's gradient, which nobody else has; no shape depends on values."""
    if ids.numel() >= len(dweight_VH):
        return dweight_VH.add_(_sums(dx, ids, len(dweight_VH), padding_idx))
    ids_N, dx_NH = ids.flatten(), dx.flatten(0, -2)
    dx_NH = dx_NH.masked_fill((ids_N == padding_idx)[:, None], 0.0)
    ordered_N = ids_N.sort().values
    # a token's sum where it is first in order, zeros where it comes again
    sums_NH = _sums(dx_NH, torch.searchsorted(ordered_N, ids_N), len(ids_N), -1)
    return dweight_VH.index_add_(0, ordered_N, sums_NH)
