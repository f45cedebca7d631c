"""Law init: the same seed gives the same model at any degree; delayed, the same distribution."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel

import tensorpar
from tensorpar.parameters import local, shard_dim
from tests.conformance.gpt2 import (
    SIZES,
    Case,
    Tensors,
    batch,
    config,
    require_equal_ranks,
    weights_of,
)

WIDE = Case(config={"n_embd": 80, "n_inner": 163, "vocab_size": 997, "n_layer": 3})


class Padded(GPT2PreTrainedModel):
    """A Transformers model whose embedding has a padding row."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd, config.pad_token_id)
        self.post_init()


class Pair(nn.Module):
    """A module of the user's own around two models."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first = transformers.GPT2LMHeadModel(first)
        self.scale = nn.Parameter(torch.rand(3))
        self.second = transformers.GPT2Model(second)


def _classes(case: Case) -> Any:
    return getattr(transformers, case.head)(config(case))


def _from_config(case: Case) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config(case))


def _from_config_bfloat16(case: Case) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config(case), dtype=torch.bfloat16)


def _pair(case: Case) -> Any:
    return Pair(config(case), config(case.but(config={"n_layer": 1})))


def initial(build: Callable[[Case], Any], case: Case, parallel: bool) -> Tensors:
    """The weights of two models built one after the other, and the next random number."""
    torch.manual_seed(7)
    found: Tensors = {}
    with tensorpar.tensor_parallelism() if parallel else nullcontext():
        models = [build(case) for _ in range(2)]
    for number, model in enumerate(models):
        found |= {f"{number}/{name}": x.detach().clone() for name, x in weights_of(model).items()}
    return {**found, "next": torch.rand(1)}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("build", "case"),
    [
        (_classes, Case()),
        (_from_config, Case()),
        (_from_config_bfloat16, Case()),
        (_classes, Case(config={"tie_word_embeddings": False, "add_cross_attention": True})),
        (_classes, Case("GPT2DoubleHeadsModel")),
        (_classes, Case("GPT2ForTokenClassification")),
        (_pair, Case()),
    ],
    ids=["class", "from_config", "bfloat16", "cross-attention", "double", "token", "pair"],
)
def test_the_same_seed_gives_the_same_model(ranks, build, case, size):
    """Gathered initial values, and the random state after, equal Transformers' bit for bit."""
    results = ranks(size).run(initial, build, case, True)
    require_equal_ranks(results)
    reference = initial(build, case, False)
    assert results[0].keys() == reference.keys()
    assert not [name for name, x in reference.items() if not torch.equal(results[0][name], x)]


class _Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that got memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if type(out) is torch.Tensor and out.device.type != "meta":
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


def born_small(delayed: bool) -> tuple[Tensors, dict[str, int | None], int]:
    """Local shards of a model, how each is sharded, and the largest tensor on the way."""
    torch.manual_seed(7)
    with (
        _Largest() as largest,
        tensorpar.tensor_parallelism(delayed_parameter_initialization=delayed),
    ):
        model = transformers.GPT2LMHeadModel(config(WIDE))
    model.train()(**batch(Case()))  # compares the ranks' random states
    named = dict(model.named_parameters())
    shards = {name: local(p).detach().clone() for name, p in named.items()}
    return shards, {name: shard_dim(p) for name, p in named.items()}, largest.numel


@pytest.mark.parametrize("size", [2, 4])
def test_delayed_initialization_draws_each_shard_on_its_rank(ranks, size):
    """Every parameter has its distribution, shards differ, replicas agree, nothing is whole."""
    results = ranks(size).run(born_small, True)
    shards, dims, _ = results[0]
    torch.manual_seed(0)
    reference = weights_of(transformers.GPT2LMHeadModel(config(WIDE)))
    for name, shard in shards.items():
        others = [other[0][name] for other in results[1:]]
        if dims[name] is None:
            assert all(torch.equal(shard, other) for other in others), name
        elif shard.ndim > 1 and "bias" not in name:
            even = [other for other in others if other.shape == shard.shape]
            assert not any(torch.equal(shard, other) for other in even), name
        whole = torch.cat([shard.flatten(), *(other.flatten() for other in others)])
        if name.endswith("bias"):
            assert not whole.any(), name
        elif "ln_" in name:
            assert (whole == 1).all(), name
        else:
            expected = reference[name].std().item()
            assert whole.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(whole.mean().item()) < 0.1 * expected, name
    for own, _, largest in results:
        assert largest == max(shard.numel() for shard in own.values())
    assert all(largest >= 997 * 80 for *_, largest in ranks(size).run(born_small, False))


def born_padded(padding: int, delayed: bool) -> torch.Tensor:
    """The whole embedding of a model with a padding row."""
    tensorpar.register(Padded, tokens=tensorpar.VocabParallel())
    try:
        with tensorpar.tensor_parallelism(delayed_parameter_initialization=delayed):
            model = Padded(transformers.GPT2Config(**{**SIZES, "pad_token_id": padding}))
    finally:
        tensorpar.unregister(Padded)
    return weights_of(model)["tokens.weight"].detach()


@pytest.mark.parametrize("padding", [0, 50, 96])
@pytest.mark.parametrize("delayed", [False, True])
def test_the_padding_row_is_zero_on_whatever_rank_it_lives(ranks, padding, delayed):
    """Exactly the padding row of a sharded embedding starts at zero."""
    for whole in ranks(4).run(born_padded, padding, delayed):
        assert (whole == 0).all(1).nonzero().flatten().tolist() == [padding]


def not_a_model() -> str:
    """The refusal of delayed initialisation outside Transformers' models."""
    tensorpar.register(nn.Sequential, **{"0": tensorpar.Column(), "1": tensorpar.Row()})
    try:
        with (
            pytest.raises(ValueError, match="outside any Transformers model") as refusal,
            tensorpar.tensor_parallelism(delayed_parameter_initialization=True),
        ):
            kept = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # noqa: F841
    finally:
        tensorpar.unregister(nn.Sequential)
    return str(refusal.value)


def test_delayed_initialization_needs_an_initialiser(ranks):
    """A module whose initial values would depend on the shard's size is refused on every rank."""
    assert all("build this one without the option" in told for told in ranks(2).run(not_a_model))
