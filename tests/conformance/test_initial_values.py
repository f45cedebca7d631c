"""Law init for every family, whenever Transformers' initialiser runs: gathered, one process's."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tensorpar
from tests.conformance.families import CASES, tiny_config
from tests.conformance.gpt2 import Tensors, refusal, require_equal_ranks, weights_of


def at_once(family: str) -> Any:
    """A model whose constructor gives it values."""
    return getattr(transformers, CASES[family].model)(tiny_config(family))


def after_meta(family: str) -> Any:
    """A model that was built without storage, and has got some."""
    with torch.device("meta"):
        model = at_once(family)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    return model


@cache
def layer_class(family: str) -> type:
    """The class of the family's layers, to be asked for outside the context at first."""
    layers = next(m for m in at_once(family).modules() if isinstance(m, nn.ModuleList))
    return type(layers[0])


def grown(family: str) -> Any:
    """A subclass that adds layers, sharded ones too, when its parent's constructor is done."""
    base: Any = getattr(transformers, CASES[family].model)

    class Grown(base):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.own = nn.Linear(5, 3)
            self.layer = layer_class(family)(config, 0)
            self.post_init()

    return Grown(tiny_config(family))


def of_its_class(family: str) -> Any:
    """A model of the class that another one has, parallel already where the other is."""
    return type(at_once(family))(tiny_config(family))


WAYS = (at_once, after_meta, grown, of_its_class)


def initial(family: str, parallel: bool) -> Tensors:
    """Weights and buffers of a model built in each way, and the next random number."""
    found: Tensors = {}
    layer_class(family)
    for way in WAYS:
        torch.manual_seed(7)
        with tensorpar.tensor_parallelism() if parallel else nullcontext():
            model = way(family)
        kept = {**weights_of(model), **dict(model.named_buffers()), "next": torch.rand(1)}
        found |= {f"{way.__name__}/{name}": x.detach().clone() for name, x in kept.items()}
    return found


@pytest.mark.feature("initial values of one process; init_weights after to_empty")
@pytest.mark.parametrize("family", sorted(CASES))
def test_the_same_seed_gives_the_same_values(ranks, family):
    """All values, and the random state after, equal Transformers' bit for bit."""
    results = ranks(4).run(initial, family, True)
    require_equal_ranks(results)
    reference = initial(family, False)
    assert results[0].keys() == reference.keys()
    assert not [name for name, x in reference.items() if not torch.equal(results[0][name], x)]


def with_other_seeds() -> tuple[str, bool]:
    """The refusal of `init_weights` where ranks would draw differently, and what is left."""
    with tensorpar.tensor_parallelism(), torch.device("meta"):
        model = at_once("gpt2")
    model.to_empty(device="cpu")
    torch.manual_seed(torch.distributed.get_rank())
    told = refusal(model.init_weights)
    torch.manual_seed(0)
    model.init_weights()
    model.init_weights()  # visits nothing
    ids = torch.arange(6).reshape(2, 3)
    return told, bool(model(ids).logits.isfinite().all())


def test_ranks_that_would_draw_differently_are_told(ranks):
    """Not a model whose ranks differ, but an error; seeded alike, the same model goes on."""
    for told, goes_on in ranks(2).run(with_other_seeds):
        assert "torch.manual_seed alike" in told
        assert goes_on
