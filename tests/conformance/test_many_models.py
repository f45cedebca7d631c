"""Models come and go: hundreds in one process leave neither hooks nor memory behind."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store, _world
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.overrides import _get_current_function_mode_stack

import tensorpar
from tensorpar import hf_construction
from tests.families import FAMILIES, PLANS_ONLY

CASES = {case.name: case for case in (*FAMILIES, *PLANS_ONLY)}
#: how many lives each family's models have before and between the two counts.
WARM_UP, LIVES = 2, 6


def subclass(base: type) -> type:
    """A user's class, a new one for each model."""

    class Mine(base):  # type: ignore[misc]
        pass

    return Mine


def live(case: Any, folder: str, kept: weakref.WeakSet[Any]) -> None:
    """One model is built, trained, saved, loaded by another, used and dropped."""
    torch.manual_seed(0)
    ids = torch.arange(12).reshape(2, 6)
    with tensorpar.tensor_parallelism():
        cls = subclass(getattr(transformers, case.model))
        model = cls(case.config(layers=1, heads=2, head_size=4, inner=8))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        model.save_pretrained(folder)
        loaded = cls.from_pretrained(folder).eval()
    loaded(input_ids=ids, output_attentions=True)
    if loaded.can_generate():
        loaded.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    kept.update([cls, model, loaded, *model.modules(), *model.parameters(), *loaded.modules()])


def fail(case: Any, kept: weakref.WeakSet[Any]) -> None:
    """A model whose forward raises, and one whose constructor does."""
    torch.manual_seed(0)
    with tensorpar.tensor_parallelism():
        model = getattr(transformers, case.model)(case.config(layers=1, heads=2, head_size=4))
    kept.add(model)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    with pytest.raises(ValueError, match="loss"), tensorpar.tensor_parallelism():
        raise ValueError("loss")


def globals_of_torch() -> dict[str, int]:
    """How many entries torch's and Transformers' process-wide tables have."""
    tables = {**vars(torch_module), **vars(torch_optimizer)}
    counts = {
        name: len(table)
        for name, table in tables.items()
        if name.startswith("_global") and hasattr(table, "__len__")
    }
    return counts | {
        "function modes": len(_get_current_function_mode_stack()),
        "groups": len(_world.pg_map),
        "keys in the store": _get_default_store().num_keys(),
        "watchers": len(hf_construction._watchers) + len(hf_construction._originals),
    }


def objects() -> Counter[str]:
    """Living objects by type; those that a leaked model, hook or class would be among."""
    gc.collect()
    kinds = (torch.Tensor, nn.Module, type, torch.optim.Optimizer)
    own = ("tensorpar", "transformers")
    return Counter(
        type(thing).__name__
        for thing in gc.get_objects()
        if issubclass(type(thing), kinds) or type(thing).__module__.startswith(own)
    )


def dropped(case: Any) -> list[str]:
    """What is left of a used model when nothing holds it, before the collector comes by."""
    ids = torch.arange(12).reshape(2, 6)
    gc.disable()
    try:
        with tensorpar.tensor_parallelism():
            model = getattr(transformers, case.model)(case.config(layers=1, heads=2, head_size=4))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        left: weakref.WeakSet[Any] = weakref.WeakSet([*model.modules(), *model.parameters()])
        del model
        return sorted({type(thing).__name__ for thing in left})
    finally:
        gc.enable()


def lives(family: str) -> dict[str, Any]:
    """What is left of many models, beyond what the first few left."""
    kept: weakref.WeakSet[Any] = weakref.WeakSet()
    rank = torch.distributed.get_rank()
    with tempfile.TemporaryDirectory() if rank == 0 else nullcontext("") as folder:
        names = [folder]
        torch.distributed.broadcast_object_list(names)
        for _ in range(WARM_UP):
            live(CASES[family], names[0], kept)
            fail(CASES[family], kept)
        before, tables = objects(), globals_of_torch()
        for _ in range(LIVES):
            live(CASES[family], names[0], kept)
            fail(CASES[family], kept)
        after = objects()
    return {
        "waits for the collector": dropped(CASES[family]),
        "alive": sorted({type(thing).__name__ for thing in kept}),
        "more objects": {name: n for name, n in (after - before).items() if n >= LIVES / 2},
        "tables": {name: n for name, n in globals_of_torch().items() if n != tables[name]},
        "patched": [
            name
            for name in ("post_init", "from_pretrained")
            if "tensorpar" in getattr(transformers.PreTrainedModel, name).__code__.co_filename
        ],
    }


@pytest.mark.feature("hundreds of models in one process")
@pytest.mark.parametrize("family", CASES)
def test_models_leave_nothing_behind(ranks, family):
    """No model, class, tensor, hook, patch, group or key of the store is left; no model waits."""
    counts = {"more objects": {}, "tables": {}, "patched": []}
    nothing = {"waits for the collector": [], "alive": [], **counts}
    assert ranks(2).run(lives, family, timeout=200.0) == [nothing] * 2
