"""Which models become parallel: contexts, nesting, threads, subclasses, finished models, copies."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

import tensorpar
from tests.conformance.gpt2 import (
    Case,
    Tensors,
    batch,
    config,
    detached,
    gradients_of,
    is_parallel,
    outputs,
    require_close,
    require_equal_ranks,
    weights_of,
)

BASE = Case("GPT2Model")
PLAIN = Case(labels=False)


class Mine(transformers.GPT2LMHeadModel):
    """A user's subclass, with a forward and a layer of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.own = nn.Linear(config.n_embd, 3)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's, and what its own layer makes of the hidden states."""
        output = super().forward(*args, **kwargs, output_hidden_states=True)
        output["extra"] = self.own(output.hidden_states[-1])
        return output


class Terse(transformers.GPT2LMHeadModel):
    """A user's forward that takes two arguments and returns a loss."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        """A loss on logits whose classes are the second dim."""
        logits = self.lm_head(self.transformer(ids).last_hidden_state)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)


class Failing(transformers.GPT2LMHeadModel):
    """A model whose constructor raises when all its layers exist."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        raise ArithmeticError("on purpose")


class HalfBuilt(transformers.GPT2LMHeadModel):
    """A model whose constructor raises before a layer that its plan requires exists."""

    def __init__(self, config: Any) -> None:
        transformers.PreTrainedModel.__init__(self, config)
        self.transformer = transformers.GPT2Model(config)
        raise ArithmeticError("on purpose")


class Discarded(nn.Module):
    """A user's module whose constructor raises when its registered child exists."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.GPT2Model(config(BASE))
        raise ArithmeticError("on purpose")


def many_models() -> dict[str, bool]:
    """Which of several models are parallel, each used before the context closes."""
    outside = transformers.GPT2Model(config(BASE))
    found = {}
    with tensorpar.tensor_parallelism():
        first = transformers.GPT2Model(config(BASE))
        outputs(first, BASE)
        second = Mine(config(Case()))
        outputs(second, Case())
        found["exclusive"] = not is_parallel(outside)
        with tensorpar.tensor_parallelism(enabled=False):
            inner_off = transformers.GPT2Model(config(BASE))
            with tensorpar.tensor_parallelism():
                innermost_on = transformers.GPT2Model(config(BASE))
        third = transformers.GPT2Model(config(BASE))
    later = transformers.GPT2Model(config(BASE))
    found |= {"first": is_parallel(first), "second": is_parallel(second)}
    found |= {"inner off": not is_parallel(inner_off), "innermost": is_parallel(innermost_on)}
    found |= {"third": is_parallel(third), "later": not is_parallel(later)}
    found["class untouched"] = type(later.h[0].attn.c_attn) is Conv1D
    found["class kept"] = [
        (repr(type(model)), isinstance(model, cls), type(type(model)(config(Case()))) is cls)
        for model, cls in ((first, transformers.GPT2Model), (second, Mine))
    ] == [(repr(cls), True, True) for cls in (transformers.GPT2Model, Mine)]
    return found


def hooks() -> tuple[Any, ...]:
    """What a context changes in torch and Transformers while it is open."""
    cls = transformers.PreTrainedModel
    return (
        len(torch_module._global_module_registration_hooks),
        cls.post_init,
        cls.__dict__["from_pretrained"].__func__,
        cls.save_pretrained,
        transformers.GPT2LMHeadModel.forward,
    )


def test_each_model_is_parallel_when_its_constructor_returns(ranks):
    """Many models in one context work at once; nesting, and what is outside, decide as written."""
    for found in ranks(2).run(many_models):
        assert all(found.values()), found


def leave_by_exceptions() -> dict[str, bool]:
    """What is left after constructors, and the context's body, have raised."""
    before = hooks()
    found = {}
    kept_alive = []
    with tensorpar.tensor_parallelism():
        for cls in (Failing, HalfBuilt):
            with pytest.raises(ArithmeticError) as raised:
                cls(config(Case()))
            kept_alive.append(raised)
        with pytest.raises(ArithmeticError) as raised:
            Discarded()
        with pytest.raises(ValueError, match="embed_dim"):
            transformers.GPT2LMHeadModel(config(Case(config={"n_head": 3})))
        found["next model"] = is_parallel(good := transformers.GPT2LMHeadModel(config(Case())))
        outputs(good, Case())
    found["kept alive"] = len(kept_alive) == 2 and raised.value is not None
    with pytest.raises(ZeroDivisionError), tensorpar.tensor_parallelism():
        1 / (hooks() == before)  # they differ within
    found["restored"] = hooks() == before
    found["plain again"] = not is_parallel(transformers.GPT2Model(config(BASE)))
    return found


def test_exceptions_leave_nothing_behind(ranks):
    """A constructor that raises leaves the next model fine, and no hook survives the context."""
    for found in ranks(2).run(leave_by_exceptions):
        assert all(found.values()), found


def in_two_threads() -> dict[str, bool]:
    """A model built by another thread while this one's context is open."""
    built: dict[str, Any] = {}

    def build_elsewhere() -> None:
        built["other"] = transformers.GPT2LMHeadModel(config(Case()))

    with tensorpar.tensor_parallelism():
        thread = threading.Thread(target=build_elsewhere)
        thread.start()
        thread.join()
        built["own"] = transformers.GPT2LMHeadModel(config(Case()))
    return {name: is_parallel(model) for name, model in built.items()}


def test_another_threads_model_is_left_alone(ranks):
    """The context belongs to the thread that opened it."""
    assert ranks(2).run(in_two_threads) == [{"other": False, "own": True}] * 2


def subclass(parallel: bool) -> Tensors:
    """Outputs of a user's subclass of a Transformers model."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    with tensorpar.tensor_parallelism() if parallel else nullcontext():
        model = Mine(config(PLAIN))
    torch.set_default_dtype(torch.float32)
    assert is_parallel(model) == parallel
    return outputs(model, PLAIN) | detached(weights_of(model), "weight")


def terse(parallel: bool) -> Tensors:
    """Loss and gradients of a forward that knows nothing of `return_dict`."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    with tensorpar.tensor_parallelism() if parallel else nullcontext():
        model = Terse(config(PLAIN))
    torch.set_default_dtype(torch.float32)
    ids = batch(PLAIN)["input_ids"]
    loss = model(ids, ids)
    loss.backward()
    return detached({"loss": loss}, "train") | detached(gradients_of(model), "gradient")


def test_a_forward_of_the_users_own_signature(ranks):
    """A forward without keyword arguments that returns a loss equals one process."""
    results = ranks(2).run(terse, True)
    require_equal_ranks(results)
    require_close(results[0], terse(False), 1e-10)


@pytest.mark.parametrize("size", [2, 4])
def test_a_subclass_is_parallel_by_its_parents_plan(ranks, size):
    """A user's subclass with its own layers and forward is found along the MRO."""
    results = ranks(size).run(subclass, True)
    require_equal_ranks(results)
    require_close(results[0], subclass(False), 1e-10)
