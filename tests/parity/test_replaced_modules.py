"""Modules that are replaced whole by a parallel stand-in: `tp_register_with_module`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import tensorpar
from tensorpar.nn import ColumnParallelLinear, RowParallelLinear

Tensors = dict[str, torch.Tensor]


class Feed(nn.Module):
    """A feed-forward block, keywords and tuple included."""

    def __init__(self, hidden: int, inner: int, scale: float = 1.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.scale = scale

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[Any, float]:
        """The output and the scale."""
        y = self.down(self.up(x).relu()) * self.scale
        return (y if residual is None else y + residual), self.scale


class ParallelFeed(nn.Module):
    """Its stand-in: other argument names, other parameter names, no tuple."""

    def __init__(self, *, width: int, inner: int, factor: float) -> None:
        super().__init__()
        self.first, self.second = (
            ColumnParallelLinear(width, inner),
            RowParallelLinear(inner, width),
        )
        self.factor = factor

    def forward(self, inputs: torch.Tensor, add: torch.Tensor | None) -> torch.Tensor:
        """The output only."""
        y = self.second(self.first(inputs).relu()) * self.factor
        return y if add is None else y + add


class Around(nn.Module):
    """A model that builds the replaced class twice, once in a way its stand-in cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = Feed(6, 9, scale=2.0)
        self.alias = self.feed
        self.small = Feed(6, 1)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Everything once."""
        y, scale = self.feed(self.norm(x), residual=x)
        z, _ = self.small(y)
        return y + z * scale


def init_hook(hidden: int, inner: int, scale: float = 1.0) -> Any:
    """Arguments of the stand-in; None for blocks too small to shard."""
    if inner < 2:
        return None
    return (), {"width": hidden, "inner": inner, "factor": scale}


def forward_hook(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    """Arguments of the stand-in's forward."""
    return (x,), {"add": residual}


def return_hook(y: torch.Tensor) -> Any:
    """The tuple that callers expect."""
    return y, 2.0


NAMES = {"first": "up", "second": "down"}


def _renamed(state_dict: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    def rename(key: str) -> str:
        return ".".join(names.get(part, part) for part in key.split("."))

    return {rename(key): x for key, x in state_dict.items()}


def to_hf(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The stand-in's names to the original's."""
    return _renamed(state_dict, NAMES)


def from_hf(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The inverse, where the keys are those of a replaced instance."""
    inverse = {ours: theirs for theirs, ours in NAMES.items()}
    return {
        key: x
        for name, x in state_dict.items()
        for key in [name if name.startswith("small") else next(iter(_renamed({name: x}, inverse)))]
    }


def replaced(how: str) -> dict[str, bool]:
    """A model with stand-ins, loaded with the original's weights, against the original."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    tensorpar.tp_register_with_module(
        Feed, ParallelFeed, init_hook, forward_hook, return_hook, (to_hf, from_hf)
    )
    try:
        reference = Around()
        if how == "context":
            with tensorpar.tensor_parallelism():
                model = Around()
        else:
            model = Around()
            tensorpar.set_tensor_parallelism(model)
        wrapped = tensorpar.DistributedModel(model)
        wrapped.load_state_dict(reference.state_dict(), layout="hf")
    finally:
        tensorpar.unregister(Feed)
    x = torch.linspace(-1, 1, 24).view(4, 6)
    ours, theirs = model(x), reference(x)
    ours.sum().backward()
    theirs.sum().backward()
    original = type(Feed(6, 2))
    return {
        "stand-in": type(model.feed) is ParallelFeed,
        "one for an alias": model.alias is model.feed,
        "left alone": type(model.small) is not ParallelFeed and isinstance(model.small, original),
        "all DTensors": all(isinstance(p, DTensor) for p in model.parameters()),
        "output": torch.allclose(ours, theirs, rtol=0, atol=1e-12),
        "gradient": torch.allclose(
            model.feed.first.weight.grad.full_tensor(), reference.feed.up.weight.grad, atol=1e-12
        ),
        "forgotten": "__wrapped__" not in vars(Feed.__init__),
    }


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", ["context", "mark"])
def test_a_class_is_replaced_whole(ranks, how, size):
    """Hooks map constructor, forward and result; `translate_functions` map its state dicts."""
    for found in ranks(size).run(replaced, how):
        assert all(found.values()), found


class Leaf(nn.Module):
    """A replaced class without children."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scales the last dim."""
        return x * self.weight


class Replaced(nn.Module):
    """Its stand-in."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = ColumnParallelLinear(size, size), RowParallelLinear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two linears."""
        return self.down(self.up(x))


class Holder(nn.Module):
    """A model that nothing is registered for, around such a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = Leaf(4)


def leaf_in_context(decorator: bool) -> str:
    """The class that stands in the place of the leaf when the context has closed."""
    if decorator:
        tensorpar.tp_register(Replaced)(Leaf)
    else:
        tensorpar.tp_register_with_module(Leaf, Replaced)
    try:
        with tensorpar.tensor_parallelism():
            model = Holder()
    finally:
        tensorpar.unregister(Leaf)
    model.leaf(torch.ones(2, 4)).sum().backward()
    return type(model.leaf).__name__


@pytest.mark.parametrize("decorator", [True, False])
def test_a_class_without_children_is_replaced(ranks, decorator):
    """A leaf of a model that is otherwise unknown is found within the context."""
    assert ranks(2).run(leaf_in_context, decorator) == ["Replaced"] * 2


def standing_alone() -> list[str]:
    """What is told of a replaced class that is the root, and of one older than its plan."""
    old = nn.Sequential(Feed(4, 4))
    tensorpar.tp_register_with_module(Feed, ParallelFeed, init_hook)
    try:
        told = []
        for module in (Feed(4, 4), old):
            with pytest.raises(ValueError, match="Feed") as refusal:
                tensorpar.parallelize(module)
            told.append(str(refusal.value))
        return told
    finally:
        tensorpar.unregister(Feed)


def test_what_cannot_be_replaced_is_refused(ranks):
    """A root, and an instance built before its class was registered, are refused by all ranks."""
    for alone, older in ranks(2).run(standing_alone):
        assert "construct its replacement directly" in alone
        assert "register the class first" in older
