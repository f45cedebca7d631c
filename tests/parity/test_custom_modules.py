"""Modules that are the user's own: annotated by a plan, or replaced by a parallel stand-in."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import tensorpar
from tensorpar import Column, Row, VocabParallel
from tensorpar.gathering import hf_layout, whole_tensors
from tensorpar.nn.linear import ColumnParallel

Tensors = dict[str, torch.Tensor]


class Attention(nn.Module):
    """Self-attention as people write it, with fused projections."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, hidden
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """`[batch, sequence, hidden]`, unchanged in shape."""
        parts = self.qkv(x).split(self.size, -1)
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.drop(self.out(y.transpose(1, 2).flatten(2)))


class Model(nn.Module):
    """A little model around it: embedding, two attentions that share weights' class, a head."""

    def __init__(self, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.tokens = nn.Embedding(13, 20)
        self.blocks = nn.ModuleList(attention(20, 5) for _ in range(2))
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 13, bias=False)
        self.head.weight = self.tokens.weight
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.linspace(0, 1, 13), persistent=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Logits, or with labels the loss."""
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + block(x, causal=True)
        logits = self.head(self.norm(x)) * self.temperature
        if labels is None:
            return logits + self.offset
        return F.cross_entropy(logits.view(-1, 13), labels.view(-1))


class Gained(Attention):
    """A subclass with a parameter and a forward of its own."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__(hidden, heads)
        self.gain = nn.Parameter(torch.rand(hidden))

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """The parent's output, scaled."""
        return super().forward(x, causal=causal) * self.gain


class Shifted(Attention):
    """A subclass with a parameter between its door and the sharded layers."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__(hidden, heads)
        self.shift = nn.Parameter(torch.rand(hidden))

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """The parent's of a shifted input."""
        return super().forward(x + self.shift, causal=causal)


class Normed(Attention):
    """A subclass with norms inside: of the input, of each head, and of the output."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__(hidden, heads)
        self.before, self.after = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.of_heads = nn.LayerNorm(hidden // heads)

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """The parent's, with the three norms."""
        parts = self.qkv(self.before(x)).split(self.size, -1)
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        query, key = self.of_heads(query), self.of_heads(key)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.after(self.drop(self.out(y.transpose(1, 2).flatten(2))))


class registered:  # noqa: N801
    """Within: the plans of this file."""

    def __init__(self, *, enter: tuple[str, ...] = ("x",)) -> None:
        self.enter = enter

    def __enter__(self) -> None:
        tensorpar.register(
            Attention,
            qkv=Column(blocks=3, heads="heads"),
            out=Row(heads="heads"),
            divide=("heads", "size"),
            enter=self.enter,
        )
        tensorpar.register(Model, tokens=VocabParallel(), head=VocabParallel())

    def __exit__(self, *exc: object) -> None:
        tensorpar.unregister(Attention)
        tensorpar.unregister(Model)


def _layout(model: nn.Module, tensors: dict[str, Any]) -> Tensors:
    return hf_layout(model, dict(whole_tensors(tensors)))


def annotated(
    attention: type[Attention], enter: tuple[str, ...], parallel: bool, labels: bool
) -> Tensors:
    """Output, gradients and the weights after a clipped step."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    with registered(enter=enter):
        with tensorpar.tensor_parallelism() if parallel else nullcontext():
            model = Model(attention)
        ids = torch.arange(14).view(2, 7) % 13
        output = model(ids, ids.flip(1)) if labels else model(ids)
        output.square().sum().backward()
    torch.set_default_dtype(torch.float32)
    assert all(isinstance(p, DTensor) == parallel for p in model.parameters())
    assert isinstance(model.blocks[0].qkv, ColumnParallel) == parallel
    assert model.head.weight is model.tokens.weight
    named = dict(model.named_parameters())
    gradients = _layout(model, {name: p.grad.clone() for name, p in named.items()})
    found = {"output": output, **gradients}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True).step()
    found |= {f"stepped/{name}": x for name, x in _layout(model, named).items()}
    return {name: x.detach().clone() for name, x in found.items()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("attention", "enter"),
    [
        (Attention, ("x",)),
        (Attention, ()),
        (Normed, ("x",)),
        (Normed, ()),
        (Gained, ()),
        (Shifted, ()),
    ],
)
@pytest.mark.parametrize("labels", [False, True])
def test_a_plan_of_a_few_lines_makes_a_model_parallel(ranks, attention, enter, labels, size):
    """The user's classes, and a subclass along the MRO, equal one process at any degree."""
    results = ranks(size).run(annotated, attention, enter, True, labels)
    reference = annotated(attention, enter, False, labels)
    for one in results:
        assert one.keys() == reference.keys()
        for name, x in one.items():
            assert torch.equal(x, results[0][name]), name
            torch.testing.assert_close(x, reference[name], rtol=0, atol=1e-10, msg=name)


def refuses_a_door_before_own_parameters() -> bool:
    """Whether a door is refused to a module whose own parameter may stand on either side of it."""
    model = Model(Shifted)
    with (
        registered(),
        pytest.raises(ValueError, match=r"\['shift'\] of its own, required: not both"),
    ):
        tensorpar.parallelize(model)
    return type(model.blocks[0].qkv) is nn.Linear


def test_a_door_and_own_parameters_are_refused(ranks):
    """What is used before the sharded layers and what after cannot be told apart: a clear error."""
    assert all(ranks(2).run(refuses_a_door_before_own_parameters))


def left_alone() -> dict[str, bool]:
    """Modules built outside, or with the context off, while plans are registered."""
    with registered():
        outside = Model()
        with tensorpar.tensor_parallelism(enabled=False):
            off = Model()
        with tensorpar.tensor_parallelism():
            on = Model()
            with tensorpar.tensor_parallelism(enabled=False):
                inner_off = Model()
    return {
        "outside": type(outside.blocks[0].qkv) is nn.Linear,
        "off": type(off.blocks[0].qkv) is nn.Linear,
        "on": isinstance(on.blocks[0].qkv, ColumnParallel),
        "inner off": type(inner_off.blocks[0].qkv) is nn.Linear,
    }


def test_modules_built_elsewhere_are_left_alone(ranks):
    """Only what is built within an enabled context becomes parallel."""
    for found in ranks(2).run(left_alone):
        assert all(found.values()), found
