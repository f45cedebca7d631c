"""`reproducible_dropout=True` in modules that are the user's own, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import tensorpar
from tensorpar import Column, Row
from tensorpar.options import Options
from tensorpar.reproducible import reproducing
from tests.conformance.families import EXACT, build
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    gradients_of,
    refusal,
    require_close,
    require_equal_ranks,
)
from tests.conformance.test_reproducible_dropout import P, with_dropout

REPRODUCIBLE = Options(reproducible_dropout=True)


class Attention(nn.Module):
    """Attention as people write it, with dropout wherever one may stand."""

    def __init__(self, odd: str | None = None) -> None:
        super().__init__()
        self.heads, self.size, self.odd = 5, 20, odd
        self.qkv = nn.Linear(20, 60)
        self.out = nn.Linear(20, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, 20]`, unchanged in shape."""
        p = P if self.training else 0.0
        parts = F.dropout(self.qkv(F.dropout(x, p)), p).split(self.size, -1)
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(-1)  # one query is blind
        y = F.scaled_dot_product_attention(query, key, value, mask, p)
        y = torch.dropout(y, p, self.training)
        if self.odd == "shape":
            y = F.dropout(y.flatten(1), p).view_as(y)
        if self.odd == "kind":
            y = F.dropout2d(y, p)
        if self.odd == "noise":
            y = y + torch.rand_like(y)
        y = F.dropout(y.transpose(1, 2).flatten(2), p, inplace=True)
        return F.dropout(self.out(y), p)


class Mlp(nn.Module):
    """An MLP with dropout on its wide side."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.drop, self.narrow = nn.Linear(20, 33), nn.Dropout(P), nn.Linear(33, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, 20]`, unchanged in shape."""
        return self.drop(self.narrow(self.drop(torch.relu(self.wide(x)))))


def own_modules(enter: tuple[str, ...], parallel: bool) -> Tensors:
    """Output and gradients of the user's own modules, float64, dropout on."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Mlp(), Attention()).double()
    if parallel:
        with registered(enter):
            tensorpar.parallelize(model, options=REPRODUCIBLE)
    x = torch.linspace(-1, 1, 2 * 7 * 20, dtype=torch.float64).view(2, 7, 20)
    output = model(x)
    output.square().sum().backward()
    found = {"output": output, "next random number": torch.rand(2)}
    return detached(found, "") | detached(gradients_of(model), "gradient")


@contextmanager
def registered(enter: tuple[str, ...] = ("x",)) -> Iterator[None]:
    """Within: plans for the classes above."""
    heads = {"qkv": Column(blocks=3, heads="heads"), "out": Row(heads="heads")}
    tensorpar.register(Attention, divide=("heads", "size"), enter=enter, **heads)
    tensorpar.register(Mlp, wide=Column(), narrow=Row(), enter=enter)
    try:
        yield
    finally:
        tensorpar.unregister(Attention)
        tensorpar.unregister(Mlp)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("enter", [("x",), ()])
def test_modules_of_the_users_own(ranks, enter, size):
    """Dropout on heads, on features, fused and split, before and after them: as in one process."""
    results = ranks(size).run(own_modules, enter, True)
    require_equal_ranks(results)
    require_close(results[0], own_modules(enter, False), EXACT)


def own_attention(size: int | None) -> Tensors:
    """Output and parameters' gradients of the library's own attention, half of it dropped."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    layer = tensorpar.nn.ParallelAttention(
        8, 6, num_kv_heads=3, head_dim=2, dropout=0.5, is_causal=True, reproducible_dropout=True
    )
    x = torch.linspace(-1, 1, 2 * 7 * 8).view(2, 7, 8)
    output = layer(x)
    output.square().sum().backward()
    torch.set_default_dtype(torch.float32)
    assert layer.mesh.size() == size
    return detached({"output": output, "next": torch.rand(2)} | gradients_of(layer), "")


def test_the_librarys_own_attention(ranks):
    """Grouped heads, ranks without one, and torch's kernel at degree 1 agree."""
    (reference,) = ranks(1).run(own_attention, 1)
    for size in (2, 4):
        results = ranks(size).run(own_attention, size)
        require_equal_ranks(results)
        require_close(results[0], reference, EXACT)


def refusals() -> list[str]:
    """Errors of what cannot be matched, each on every rank."""
    told = []
    for odd in ("shape", "kind", "noise"):
        model = nn.Sequential(Attention(odd))
        with registered():
            tensorpar.parallelize(model, options=REPRODUCIBLE)
        told.append(refusal(lambda m=model: m(torch.ones(2, 7, 20)), RuntimeError))
        assert not reproducing()
        model.eval()(torch.ones(2, 7, 20))
    for implementation in ("flash_attention_2", "flex_attention"):
        model = build("bert", "BertModel", parallel=False)
        model.config._attn_implementation = implementation
        told.append(refusal(lambda m=model: tensorpar.parallelize(m, options=REPRODUCIBLE)))
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    model = with_dropout("bert", "eager", parallel=True, reproducible_dropout=True)
    model.config._attn_implementation = "flash_attention_2"
    return [*told, refusal(lambda: model.bert.encoder.layer[0](torch.zeros(1, 3, 40).double()))]


def test_what_cannot_be_matched_is_refused(ranks):
    """Shapes and functions whose whole is not known, and kernels, with what to do instead."""
    for shape, kind, noise, *kernels in ranks(2).run(refusals):
        assert "dropout on shape = (2, " in shape
        assert "heads as dim -3" in shape
        assert "dropout2d inside Attention draws for this rank's part alone" in kind
        assert "rand_like inside Attention" in noise
        for kernel in kernels:
            assert "required: one of ['eager', 'sdpa']" in kernel
            assert "attn_implementation='eager'" in kernel
