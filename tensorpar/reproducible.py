"""Dropout that draws what one process draws: `reproducible_dropout=True`.

Where activations are sharded, inside a layer's doors, each rank draws the mask of all heads (or
features) from the common stream, in the order and the shape of one process, and keeps its own part.
So the stream is never forked, and a run with dropout on has the losses of one process at any
degree. The price: masks cost `batch x all heads x queries x keys` on every rank, and attention is
computed in the open, since no fused kernel tells its masks.

Transformers' maths is left as it is; while a layer's forward runs, a `TorchFunctionMode` answers
the few functions of torch that draw. Without the option there is no mode and no cost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from tensorpar.open_attention import attention_in_the_open
from tensorpar.parameters import shard_dim
from tensorpar.partition import chunk_bounds

ADVICE = "use nn.Dropout, F.dropout or F.scaled_dot_product_attention, or leave the option off"

#: what draws random numbers for a tensor whose whole shape is not known, or in an unknown order.
_REFUSED: dict[Callable[..., Any], str] = {
    getattr(owner, name): name
    for owner, names in (
        (F, ("alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d")),
        (F, ("gumbel_softmax", "rrelu", "multi_head_attention_forward")),
        (torch, ("bernoulli", "normal", "rand", "rand_like", "randn", "randn_like")),
        (torch.Tensor, ("bernoulli_", "normal_", "uniform_")),
    )
    for name in names
}

_answering: ContextVar[bool] = ContextVar("answering_dropout", default=False)
_num_modes: ContextVar[int] = ContextVar("whole_masks", default=0)


def reproducing() -> bool:
    """Whether a layer that now runs must draw what one process draws."""
    return _num_modes.get() > 0


@dataclass(frozen=True)
class Share:
    """A rank's part of an axis.

    Attributes:
        total: the axis' global length.
        start: where the part begins.
        length: how long it is. A rank without a head counts the one it pretends to have.
    """

    total: int
    start: int
    length: int

    @classmethod
    def of(cls, total: int, mesh: DeviceMesh, *, at_least_one: bool = False) -> Share:
        """This rank's part of an axis cut as `Shard` cuts it."""
        start, stop = chunk_bounds(total, mesh.size(), mesh.get_local_rank())
        if at_least_one and start == stop:
            return cls(total, 0, 1)
        return cls(total, start, stop - start)


@dataclass(frozen=True)
class Place:
    """How a local tensor lies in the whole one: its whole shape, and the axis that is cut.

    Attributes:
        shape: the whole shape, joined axes apart.
        dim: the cut axis in it.
        share: this rank's part of that axis.
    """

    shape: tuple[int, ...]
    dim: int
    share: Share

    def mask(self, like: torch.Tensor, p: float) -> torch.Tensor:
        """This rank's part of a scaled dropout mask that is drawn whole; shaped as `like`."""
        whole = F.dropout(like.new_ones(self.shape), p, training=True)
        return whole.narrow(self.dim, self.share.start, self.share.length).reshape(like.shape)


class WholeMasks(TorchFunctionMode):
    """Within: dropout on sharded activations of one module draws whole masks.

    Activations are sharded from the output of a column layer to the input of a row layer; before
    and after, torch's own dropout draws the same on all ranks.

    Args:
        name: of the module, for errors.
        heads: this rank's share of its heads, if it has any.
    """

    def __init__(self, name: str, heads: Share | None) -> None:
        super().__init__()
        self.name = name
        self.heads = heads
        self.sharded = False
        self._widths: dict[int, Place] = {}

    def __enter__(self) -> WholeMasks:
        _num_modes.set(_num_modes.get() + 1)
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        _num_modes.set(_num_modes.get() - 1)
        super().__exit__(*exception)

    def after_column(self, column: Any) -> None:
        """Activations are sharded from now on, and some are as wide as this layer's output."""
        self.sharded = True
        shape, cut = tuple(column.weight.shape[:-1]), shard_dim(column.weight)
        if cut is None:
            return
        share = Share.of(shape[cut], column.mesh, at_least_one=column.heads_dim is not None)
        for first in range(cut + 1):  # fused blocks together, then split
            for after in range(cut + 1, max(cut + 2, len(shape))):
                axes = (*shape[first : cut + 1], *shape[after:])
                place = Place(axes, cut - first, share)
                self._widths.setdefault(prod(axes) // share.total * share.length, place)

    def before_row(self) -> None:
        """Activations are whole from now on, or terms of a sum that take a common mask."""
        self.sharded = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        if (answer is None and func not in _REFUSED) or not self.sharded or _answering.get():
            return func(*args, **kwargs)
        if answer is None:
            if _draws_nothing(func, args, kwargs):
                return func(*args, **kwargs)
            raise RuntimeError(
                f"{_REFUSED[func]} inside {self.name} draws for this rank's part alone, required "
                f"under reproducible_dropout = True: draws that are known whole; {ADVICE}"
            )
        token = _answering.set(True)
        try:
            return answer(self, func, *args, **kwargs)
        finally:
            _answering.reset(token)

    def dropout(
        self,
        func: Callable[..., Any],
        input: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> torch.Tensor:
        """`F.dropout` on this rank's part."""
        if not training or p == 0.0:
            return func(input, p, training)
        mask = self.place(input).mask(input, p)
        return input.mul_(mask) if inplace else input * mask

    def torch_dropout(
        self, func: Callable[..., Any], input: torch.Tensor, p: float, train: bool
    ) -> torch.Tensor:
        """`torch.dropout`, whose arguments have other names."""
        return self.dropout(func, input, p, train)

    def attention(  # noqa: PLR0913  (torch's own arguments)
        self,
        func: Callable[..., Any],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`F.scaled_dot_product_attention` on this rank's heads."""
        if dropout_p == 0.0:
            return func(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        if query.device.type != "cpu":
            raise RuntimeError(
                f"F.scaled_dot_product_attention with dropout on {query.device} inside {self.name},"
                " required under reproducible_dropout = True: the cpu, where its draws are known; "
                "use attn_implementation='eager'"
            )

        def drop(weights: torch.Tensor) -> torch.Tensor:
            return weights * self.place(weights).mask(weights, dropout_p)

        return attention_in_the_open(query, key, value, attn_mask, drop, is_causal, **kwargs)

    def place(self, x: torch.Tensor) -> Place:
        """How this rank's `x` lies in that of one process.

        Raises:
            RuntimeError: neither its heads nor its last dim are what this module shards.
        """
        wide = self._widths.get(x.shape[-1]) if x.ndim else None
        heads = self.heads
        has_heads = heads is not None and x.ndim >= 3 and x.shape[-3] == heads.length
        if heads is not None and has_heads and (x.ndim >= 4 or wide is None):
            shape = (*x.shape[:-3], heads.total, *x.shape[-2:])
            return Place(shape, x.ndim - 3, heads)
        if wide is not None:
            leading = tuple(x.shape[:-1])
            return Place((*leading, *wide.shape), len(leading) + wide.dim, wide.share)
        parts = f"{heads.length} heads as dim -3, or " if heads is not None else ""
        raise RuntimeError(
            f"dropout on shape = {tuple(x.shape)} inside {self.name}, required under "
            f"reproducible_dropout = True: this rank's part of a known whole, that is {parts}"
            f"a last dim in {sorted(self._widths)}; move the dropout, or leave the option off"
        )


def _draws_nothing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a dropout of another kind is one of evaluation, or its probability 0."""
    if not inspect.isfunction(func):
        return False
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    return not given.get("training", True) or given.get("p", given.get("dropout_p", 1.0)) == 0.0


_ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: WholeMasks.dropout,
    torch.dropout: WholeMasks.torch_dropout,
    F.scaled_dot_product_attention: WholeMasks.attention,
}


def refuse_unknown_order(module: nn.Module, implementation: str | None, device_type: str) -> None:
    """Raise unless the draws of an attention implementation are known.

    Args:
        module: whose attention it is.
        implementation: Transformers' name of it; None where there is no choice.
        device_type: of the mesh.

    Raises:
        ValueError: a kernel draws its dropout in an order that cannot be matched.
    """
    allowed = ("eager", "sdpa") if device_type == "cpu" else ("eager",)
    if implementation is not None and implementation not in allowed:
        raise ValueError(
            f"reproducible_dropout = True with attn_implementation = {implementation!r} of "
            f"{type(module).__name__} on {device_type}, required: one of {list(allowed)}, whose "
            "order of draws is known; build the model with attn_implementation='eager'"
        )
