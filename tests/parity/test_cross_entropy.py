"""The loss on a sharded vocabulary against `torch.nn.functional.cross_entropy` on all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import DTensor

import tensorpar
from tensorpar.nn import vocab_parallel_cross_entropy
from tensorpar.nn.cross_entropy import ShardedLoss, loss_on_shards
from tensorpar.parameters import from_local, local_shard
from tests.pool import Pool


def _require_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10, equal_nan=True)


def _draw(num_rows: int, vocab: int, seed: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64) * scale
    return logits, torch.randint(vocab, (num_rows,), generator=generator)


def on_shards(
    num_rows: int, vocab: int, reduction: str, ignored: list[int], seed: int, scale: float
) -> None:
    """Loss and gradient of `vocab_parallel_cross_entropy`, with some targets ignored."""
    full, target = _draw(num_rows, vocab, seed, scale)
    target[[row for row in ignored if row < num_rows]] = -7
    mesh = tensorpar.tp_mesh()
    own = local_shard(full, mesh, 1).clone().requires_grad_()
    kept = own.detach().clone()
    loss = vocab_parallel_cross_entropy(
        own, target, vocab_size=vocab, mesh=mesh, ignore_index=-7, reduction=reduction
    )
    full.requires_grad_()
    reference = F.cross_entropy(full, target, ignore_index=-7, reduction=reduction)
    _require_close(loss, reference)
    weights = torch.linspace(0.5, 2, loss.numel()).view_as(loss)
    (loss * weights).sum().backward()
    (reference * weights).sum().backward()
    assert torch.equal(own, kept)
    _require_close(own.grad, local_shard(full.grad, mesh, 1))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(
    num_rows=st.integers(1, 6),
    vocab=st.integers(1, 13),
    ignored=st.lists(st.integers(0, 5), max_size=6),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 1.0, 300.0]),
)
def test_loss_and_gradient_are_torchs(ranks: Pool, size: int, reduction: str, **drawn: Any) -> None:
    """Any vocabulary, smaller than the world too, any ignored rows, and logits of any size."""
    names = ("num_rows", "vocab", "ignored", "seed", "scale")
    num_rows, vocab, ignored, seed, scale = (drawn[name] for name in names)
    ranks(size).run(on_shards, num_rows, vocab, reduction, ignored, seed, scale)


def banned_tokens(vocab: int) -> None:
    """Loss and gradient where the second half of the vocabulary is ruled out."""
    mesh = tensorpar.tp_mesh()
    full, _ = _draw(3, vocab, 0, 1.0)
    full[:2, vocab // 2 :] = -torch.inf
    target = torch.tensor([0, 1, vocab - 1])
    own = local_shard(full, mesh, 1).clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(own, target, vocab_size=vocab, mesh=mesh)
    full.requires_grad_()
    reference = F.cross_entropy(full, target)
    loss.backward()
    reference.backward()
    _require_close(loss, reference)
    _require_close(own.grad, local_shard(full.grad, mesh, 1))
    assert own.grad.isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab", [4, 8, 6])
def test_tokens_of_probability_zero(ranks, vocab, size):
    """Logits of -inf, on whole shards too, give torch's loss and gradients, not nan."""
    ranks(size).run(banned_tokens, vocab)


def half_precision(scale: float) -> None:
    """The gradient of logits in 16 bits, within their rounding of the exact one."""
    full, target = _draw(5, 97, 2, scale)
    full = full.bfloat16()
    mesh = tensorpar.tp_mesh()
    own = local_shard(full, mesh, 1).clone().requires_grad_()
    vocab_parallel_cross_entropy(own, target, vocab_size=97, mesh=mesh, reduction="sum").backward()
    exact = full.double().requires_grad_()
    F.cross_entropy(exact, target, reduction="sum").backward()
    reference = local_shard(exact.grad, mesh, 1)
    torch.testing.assert_close(own.grad.double(), reference, rtol=2**-6, atol=2**-10)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_gradients_in_half_precision(ranks, scale):
    """Logits of a large sum, whose logarithm 16 bits round by more than a probability's digits."""
    ranks(2).run(half_precision, scale)


def twice() -> None:
    """A gradient penalty on this rank's logits."""
    logits = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([0, 5, 7])
    loss = vocab_parallel_cross_entropy(logits, target, vocab_size=8, mesh=tensorpar.tp_mesh())
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="call the model without labels"):
        grad.square().sum().backward()


def test_a_second_derivative_is_refused(ranks):
    """Rather than one that leaves out what other ranks' logits have to do with it."""
    ranks(2).run(twice)


def refusals() -> list[str]:
    """What wrong targets and reductions are told."""
    mesh = tensorpar.tp_mesh()
    own = local_shard(torch.zeros(2, 5), mesh, 1)
    told = []
    for target in (torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError) as refusal:
            vocab_parallel_cross_entropy(own, target, vocab_size=5, mesh=mesh)
        told.append(str(refusal.value))
    with pytest.raises(ValueError, match="required: 'mean', 'sum' or 'none'"):
        vocab_parallel_cross_entropy(
            own, torch.tensor([0, 1]), vocab_size=5, mesh=mesh, reduction="batchmean"
        )
    return told


def test_wrong_targets_are_refused_on_every_rank(ranks):
    """A target outside the vocabulary names itself and the range, on the ranks without it too."""
    for told in ranks(4).run(refusals):
        assert told == [
            "targets [5], required: in [0, 5) or ignore_index = -100",
            "targets [-1], required: in [0, 5) or ignore_index = -100",
        ]


CLASS_WEIGHTS = torch.linspace(0.2, 1.8, 11, dtype=torch.float64)
FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore_index": {"ignore_index": 3},
    "class weights": {"weight": CLASS_WEIGHTS},
    "label smoothing": {"label_smoothing": 0.2},
    "weights, smoothing, sum": {
        "weight": CLASS_WEIGHTS,
        "label_smoothing": 0.1,
        "reduction": "sum",
    },
}


class Head(nn.Module):
    """What a language-model head does within a forward that computes its loss."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.mesh = nn.Parameter(weight), tensorpar.tp_mesh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits as a DTensor `Shard(-1)`."""
        assert loss_on_shards()
        logits = F.linear(x, local_shard(self.weight, self.mesh, 0))
        return from_local(logits, self.mesh, logits.ndim - 1, (*x.shape[:-1], 11))


def in_a_model(how: str, form: dict[str, Any], dtype: torch.dtype) -> None:
    """Loss and weight gradient of a forward that calls torch's loss on sharded logits."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(11, (2, 5), generator=generator)
    head, full = Head(weight), weight.clone().requires_grad_()

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        if how == "transposed":
            return F.cross_entropy(logits.transpose(1, 2), target, **form)
        flat, labels = logits.to(dtype).view(-1, 11), target.view(-1)
        if how == "module":
            return nn.CrossEntropyLoss(**form)(flat, labels)
        if how == "keywords":
            return F.cross_entropy(input=flat, target=labels, **form)
        if how == "soft targets":
            soft = torch.linspace(0, 1, 110, dtype=dtype).view(10, 11).softmax(1)
            return F.cross_entropy(flat, soft, **form)
        return F.cross_entropy(flat, labels, **form)

    with ShardedLoss():
        logits = head(x)
        assert isinstance(logits, DTensor)
        loss = loss_of(logits)
    reference = loss_of(F.linear(x, full))
    assert not isinstance(loss, DTensor)
    _require_close(loss, reference)
    loss.sum().backward()
    reference.sum().backward()
    mesh = tensorpar.tp_mesh()
    _require_close(local_shard(head.weight.grad, mesh, 0), local_shard(full.grad, mesh, 0))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", ["function", "module", "keywords", "transposed"])
@pytest.mark.parametrize("form", FORMS)
def test_torchs_own_call_is_answered(ranks, form, how, size):
    """`F.cross_entropy` and `CrossEntropyLoss` take sharded logits in a model's forward."""
    ranks(size).run(in_a_model, how, FORMS[form], torch.float64)


@pytest.mark.parametrize("form", ["mean", "sum", "label smoothing"])
def test_soft_targets_are_answered(ranks, form):
    """Targets that are probabilities give torch's loss and gradients."""
    ranks(4).run(in_a_model, "soft targets", FORMS[form], torch.float64)


def scope() -> dict[str, bool]:
    """Where heads may keep their logits sharded, before, within and after such a forward."""
    found = {"before": not loss_on_shards()}
    with ShardedLoss():
        found["within"] = loss_on_shards()
        with ShardedLoss():
            found["nested"] = loss_on_shards()
        found["still"] = loss_on_shards()
        found["plain logits"] = torch.equal(
            F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1])), torch.tensor(3.0).log()
        )
    with pytest.raises(IndexError), ShardedLoss():
        [][loss_on_shards()]
    found["after"] = not loss_on_shards()
    found["mode left"] = not torch.overrides._get_current_function_mode_stack()
    return found


def test_the_mode_ends_with_the_forward(ranks):
    """Nothing of the mode is left after a forward, not even after one that raised."""
    for found in ranks(2).run(scope):
        assert all(found.values()), found
