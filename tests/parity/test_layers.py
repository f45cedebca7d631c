"""Parallel layers against the same maths in one process, on their own gathered weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from tensorpar.mesh import tp_mesh
from tensorpar.nn import (
    ColumnParallelLinear,
    ParallelAttention,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tensorpar.parameters import local, local_shard, parameter, shard_dim

Tensors = dict[str, torch.Tensor]


def _whole(tensors: dict[str, Any]) -> Tensors:
    return {name: x.full_tensor().detach() for name, x in tensors.items()}


def _parameters(module: nn.Module) -> Tensors:
    return _whole(dict(module.named_parameters()))


def _gradients(module: nn.Module) -> Tensors:
    return _whole({name: p.grad for name, p in module.named_parameters()})


def _draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _close(ours: Tensors, reference: Tensors) -> None:
    assert ours.keys() == reference.keys()
    for name, x in ours.items():
        torch.testing.assert_close(
            x, reference[name], rtol=0, atol=1e-10, msg=lambda m, n=name: n + m
        )


def _leaves(full: Tensors) -> Tensors:
    return {name: x.clone().requires_grad_() for name, x in full.items()}


def _float64() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def same_as_torch(in_features: int, out_features: int) -> None:
    """Layers of one seed hold the weights that torch's own would have."""
    pairs = [
        (nn.Linear(in_features, out_features), ColumnParallelLinear, (in_features, out_features)),
        (nn.Linear(in_features, out_features), RowParallelLinear, (in_features, out_features)),
        (nn.Embedding(in_features, 3), VocabParallelEmbedding, (in_features, 3)),
        (nn.Embedding(in_features, 3, 2), VocabParallelEmbedding, (in_features, 3, 2)),
    ]
    for plain, cls, arguments in pairs:
        torch.manual_seed(3)
        plain.reset_parameters()
        torch.manual_seed(3)
        layer = cls(*arguments)
        assert isinstance(layer, type(plain))
        assert all(isinstance(p, DTensor) for p in layer.parameters())
        for name, x in _parameters(layer).items():
            assert torch.equal(x, getattr(plain, name)), (cls, name)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("in_features", "out_features"), [(8, 4), (5, 7), (3, 1)])
def test_layers_start_as_torchs_own(ranks, in_features, out_features, size):
    """The same seed gives the weights of `torch.nn`'s layer, at any degree and any size."""
    ranks(size).run(same_as_torch, in_features, out_features)


def column_and_row(bias: bool, hidden: int, gather_output: bool) -> None:
    """A column layer, an activation, a row layer: outputs and all gradients."""
    _float64()
    column = ColumnParallelLinear(5, hidden, bias, gather_output=gather_output)
    row = nn.Linear(hidden, 3) if gather_output else RowParallelLinear(hidden, 3, bias)
    x = _draw(2, 4, 5).requires_grad_()
    y = row(F.gelu(column(x)))
    (y * _draw(2, 4, 3, seed=2)).sum().backward()
    layers = [column] if gather_output else [column, row]

    full = [_leaves(_parameters(layer)) for layer in layers]
    if gather_output:
        full.append(_leaves(dict(row.named_parameters())))
    x_full = x.detach().clone().requires_grad_()
    y_full = F.linear(F.gelu(F.linear(x_full, **full[0])), **full[1])
    (y_full * _draw(2, 4, 3, seed=2)).sum().backward()
    _close({"y": y, "dx": x.grad}, {"y": y_full, "dx": x_full.grad})
    for layer, leaves in zip(layers, full, strict=False):
        _close(_gradients(layer), {name: leaf.grad for name, leaf in leaves.items()})


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("hidden", [8, 7, 2])
@pytest.mark.parametrize(("bias", "gather_output"), [(True, False), (False, False), (True, True)])
def test_column_then_row_equals_two_linears(ranks, bias, hidden, gather_output, size):
    """Even, uneven and fewer features than ranks, with and without bias or gathering."""
    ranks(size).run(column_and_row, bias, hidden, gather_output)


def embedding(num_tokens: int, padding: int | None) -> None:
    """Rows and the gradient of every row."""
    _float64()
    layer = VocabParallelEmbedding(num_tokens, 3, padding)
    tokens = torch.arange(24).remainder(num_tokens).view(2, 12)
    y = layer(tokens)
    (y * _draw(2, 12, 3)).sum().backward()
    weight = _parameters(layer)["weight"].requires_grad_()
    y_full = F.embedding(tokens, weight, padding)
    (y_full * _draw(2, 12, 3)).sum().backward()
    _close({"y": y}, {"y": y_full})
    _close(_gradients(layer), {"weight": weight.grad})
    for wrong in (-1, num_tokens):
        with pytest.raises(IndexError, match=rf"required: in \[0, {num_tokens}\)"):
            layer(torch.tensor([0, wrong]))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("num_tokens", "padding"), [(8, None), (7, 6), (7, 3), (3, 0), (1, None)])
def test_embedding_equals_torchs(ranks, num_tokens, padding, size):
    """Rows, gradients and the padding row are torch's; tokens out of range are refused by all."""
    ranks(size).run(embedding, num_tokens, padding)


ATTENTION = {
    "heads": {"num_heads": 4},
    "uneven heads": {"num_heads": 5, "head_dim": 4},
    "grouped": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4},
    "one key/value head": {"num_heads": 4, "num_kv_heads": 1},
    "three key/value heads": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 2},
    "no bias": {"num_heads": 4, "bias": False},
    "causal": {"num_heads": 5, "head_dim": 4, "is_causal": True},
    "cross": {"num_heads": 4, "kv_size": 7},
    "masked": {"num_heads": 4},
    "added": {"num_heads": 4, "is_causal": True},
}


def _mask(name: str) -> torch.Tensor | None:
    lower = torch.ones(6, 6).tril().bool()
    if name == "masked":
        return (
            lower.expand(2, 1, 6, 6).clone().index_fill(3, torch.tensor([2]), False)
            | torch.eye(6).bool()
        )
    return (
        torch.zeros(6, 6).masked_fill(~lower, -torch.inf) + _draw(6, 6) if name == "added" else None
    )


def _explicit(
    layer: ParallelAttention, full: Tensors, x: Any, memory: Any, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention written out, one head after another."""
    y = x if memory is None else memory
    scores_mask = torch.zeros(x.shape[1], y.shape[1])
    if mask is not None:
        scores_mask = (
            torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            if mask.dtype == torch.bool
            else mask
        )
    elif layer.is_causal:
        scores_mask = scores_mask.masked_fill(
            ~torch.ones_like(scores_mask).tril().bool(), -torch.inf
        )
    scores_mask = scores_mask.reshape(-1, *scores_mask.shape[-2:])
    group = layer.num_heads // layer.num_kv_heads
    output = 0.0
    for head in range(layer.num_heads):
        kv, member = divmod(head, group)

        def project(name: str, source: Any, *index: int) -> Any:
            bias = full.get(f"{name}_bias")
            product = source @ full[f"{name}_weight"][index].T
            return product if bias is None else product + bias[index]

        query, key, value = project("q", x, kv, member), project("k", y, kv), project("v", y, kv)
        scores = query @ key.transpose(-1, -2) / layer.head_dim**0.5 + scores_mask
        columns = slice(member * layer.head_dim, (member + 1) * layer.head_dim)
        output = output + scores.softmax(-1) @ value @ full["out_weight"][:, kv, columns].T
    return output + full.get("out_bias", torch.zeros(()))


def attention(name: str) -> None:
    """Outputs, the inputs' gradients and all weights' gradients."""
    _float64()
    options = dict(ATTENTION[name])
    layer = ParallelAttention(8, **options)
    sharded = {shard_dim(p) for n, p in layer.named_parameters() if n != "out_bias"}
    assert None not in sharded
    inputs = {"x": _draw(2, 6, 8)}
    if name == "cross":
        inputs["memory"] = _draw(2, 3, 7, seed=5)
    mask, direction = _mask(name), _draw(2, 6, 8, seed=2)
    ours, reference = _leaves(inputs), _leaves(inputs)
    y = layer(ours["x"], ours.get("memory"), mask)
    (y * direction).sum().backward()
    full = _leaves(_parameters(layer))
    y_full = _explicit(layer, full, reference["x"], reference.get("memory"), mask)
    (y_full * direction).sum().backward()
    _close({"y": y}, {"y": y_full})
    _close({n: x.grad for n, x in ours.items()}, {n: x.grad for n, x in reference.items()})
    _close(_gradients(layer), {n: leaf.grad for n, leaf in full.items()})


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_its_formula(ranks, name, size):
    """Grouped, causal, cross and masked attention equals head by head maths, idle ranks or not."""
    ranks(size).run(attention, name)


def attention_weights() -> Tensors:
    """The initial weights of one seed."""
    return _parameters(ParallelAttention(8, 6, num_kv_heads=3, head_dim=2))


def test_attention_starts_alike_at_any_degree(ranks):
    """The same seed gives the same attention weights at one, two and four ranks."""
    one, *others = ranks(1).run(attention_weights) + ranks(4).run(attention_weights)
    others += ranks(2).run(attention_weights)
    for other in others:
        assert all(torch.equal(other[name], x) for name, x in one.items())


def dropped() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output of attention with dropout twice from one seed, and the next random number."""
    _float64()
    layer = ParallelAttention(8, 4, dropout=0.5)
    outputs = []
    for _ in range(2):
        torch.manual_seed(9)
        outputs.append(layer(_draw(2, 6, 8)).detach())
    return outputs[0], outputs[1], torch.rand(1)


def test_attention_dropout_is_reproducible_and_replicated(ranks):
    """With dropout the output is the same on all ranks and for the same seed."""
    results = ranks(2).run(dropped)
    assert torch.equal(results[0][0], results[0][1])
    for ours, first in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, first)


def refused(options: dict[str, Any]) -> str:
    """The message with which sizes that do not divide are refused."""
    with pytest.raises(ValueError, match="required: a multiple of") as refusal:
        ParallelAttention(8, **options)
    return str(refusal.value)


@pytest.mark.parametrize("options", [{"num_heads": 3}, {"num_heads": 4, "num_kv_heads": 3}])
def test_attention_refuses_sizes_that_do_not_divide(ranks, options):
    """Head counts that do not divide are refused on every rank, with the numbers."""
    assert all("num_heads" in told for told in ranks(2).run(refused, options))


def differentiated_twice() -> None:
    """A gradient of a gradient, and one added to it, placed as the parameter is."""
    full = _draw(5, 3).double().requires_grad_()
    mine = parameter(local_shard(full, tp_mesh(), 0), tp_mesh(), 0, full.shape)
    (once,) = torch.autograd.grad((local(mine) ** 3).sum(), mine, create_graph=True)
    (local(once) ** 2).sum().backward()
    local(mine).sum().backward()
    assert mine.grad is not None
    assert (mine.grad.placements, mine.grad.shape) == (mine.placements, mine.shape)
    torch.testing.assert_close(mine.grad.full_tensor(), 36 * full.detach() ** 3 + 1)


def test_local_parameters_can_be_differentiated_twice(ranks):
    """Five rows on two ranks: f'' of what is computed from a local part is exact."""
    ranks(2).run(differentiated_twice)
