"""The gradient of a weight that embeds and scores, against torch's own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tensorpar.nn.tied import embedded, scoring, tied_weights

VOCAB, HIDDEN = 13, 5
#: tokens that come more than once, some of them the padding.
FEW, MANY = [[3, 7, 3], [0, 12, 7]], [list(range(VOCAB)), [4] * VOCAB]


class Model:
    """Tokens to logits by one weight, as tensorpar's layers have it, or as torch has."""

    def __init__(self, *, own: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
        self.weight.requires_grad_()
        self.own = own

    def embed(self, ids: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
        if self.own:
            return embedded(self.weight, ids, padding_idx)
        return F.embedding(ids, self.weight, padding_idx)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, scoring(self.weight) if self.own else self.weight)

    def forward(self) -> AbstractContextManager[None]:
        return tied_weights() if self.own else nullcontext()


class DenseGradients(TorchDispatchMode):
    """Counts gradients of an embedding that have the size of its weight."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding_dense_backward.default:
            self.count += len(out) == VOCAB
        return out


@pytest.fixture(params=[FEW, MANY], ids=["few", "many"])
def ids(request):
    return torch.tensor(request.param)


@pytest.mark.parametrize("padding_idx", [None, 0, 7])
@pytest.mark.parametrize("num_heads", [0, 1, 2])
def test_it_is_torchs_to_the_bit(ids, padding_idx, num_heads):
    """Whether no head uses the weight, one does, or two do."""
    gradients = []
    for model in (Model(own=True), Model(own=False)):
        with model.forward():
            x = model.embed(ids, padding_idx)
            loss = x.square().sum()
            for factor in range(num_heads):
                loss = loss + model.score(x.sin() + factor).cos().sum()
        loss.backward()
        gradients.append(model.weight.grad)
    assert torch.equal(*gradients)


def test_no_gradient_of_the_weights_size_is_made_for_the_embedding():
    """Its rows are added to the head's; without a head there is nothing to add them to."""
    model = Model(own=True)
    counts = []
    for scored in (True, False):
        with DenseGradients() as seen:
            with model.forward():
                x = model.embed(torch.tensor(FEW))
                loss = (model.score(x) if scored else x).sum()
            loss.backward()
        counts.append(seen.count)
    assert counts == [0, 1]


def test_a_weight_embedded_twice_in_a_forward(ids):
    """The head's gradient comes by the second; the first makes its own."""
    gradients = []
    for model in (Model(own=True), Model(own=False)):
        with model.forward():
            x = model.embed(ids) * model.embed(ids.flip(0))
            loss = model.score(x).cos().sum()
        loss.backward()
        gradients.append(model.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_gradients_of_what_the_head_alone_computed(ids):
    """Tokens do not matter where the hidden states are cut off."""
    gradients = []
    for model in (Model(own=True), Model(own=False)):
        with model.forward():
            loss = model.score(model.embed(ids).detach()).cos().sum()
        loss.backward()
        gradients.append(model.weight.grad)
    assert torch.equal(*gradients)


def test_second_derivatives(ids):
    """A penalty on gradients is differentiated as torch does."""
    penalties = []
    for model in (Model(own=True), Model(own=False)):
        with model.forward():
            loss = model.score(model.embed(ids).sin()).cos().sum()
        (gradient,) = torch.autograd.grad(loss, model.weight, create_graph=True)
        gradient.square().sum().backward()
        penalties.append(model.weight.grad)
    torch.testing.assert_close(*penalties, rtol=1e-12, atol=1e-12)


def test_two_backwards_of_one_graph(ids):
    """What the first returned is not written to by the second."""
    model = Model(own=True)
    with model.forward():
        loss = model.score(model.embed(ids)).cos().sum()
    (first,) = torch.autograd.grad(loss, model.weight, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, model.weight)
    assert torch.equal(first, kept)
    assert torch.equal(first, second)


def test_nothing_is_passed_on_to_the_next_forward():
    """Nor to what comes after the forward, nor without gradients."""
    model = Model(own=True)
    with model.forward():
        model.embed(torch.tensor(FEW))
        assert scoring(model.weight) is not model.weight
        with torch.no_grad():
            assert scoring(model.weight) is model.weight
    assert scoring(model.weight) is model.weight
    with model.forward():
        assert scoring(model.weight) is model.weight
    with model.forward(), torch.no_grad():
        model.embed(torch.tensor(FEW))
        assert scoring(model.weight) is model.weight
