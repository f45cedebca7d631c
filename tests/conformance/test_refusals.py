"""What ranks can disagree on, or users get wrong, is refused on every rank; nothing hangs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tensorpar
from tests.conformance.gpt2 import DROPOUT, Case, batch, build, config, refusal


def _own(x: torch.Tensor) -> torch.Tensor:
    """`x`, different on rank 1."""
    return x + tensorpar.tp_rank()


def batches(kind: str) -> tuple[str, bool]:
    """What ranks with unlike arguments are told, and whether the next forward works."""
    model = build(Case(config=DROPOUT), parallel=True)
    good = batch(Case())
    ids, rank = good["input_ids"], tensorpar.tp_rank()
    bad: dict[str, Any] = {
        "content": {"input_ids": _own(ids)},
        "labels": {"input_ids": ids, "labels": _own(ids)},
        "length": {"input_ids": ids[:, : 11 - rank]},
        "rows": {"input_ids": ids[: 3 - rank]},
        "dtype": {"input_ids": ids.int() if rank else ids},
        "mask on one": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "labels on one": {"input_ids": ids, "labels": ids},
        "flag": {"input_ids": ids, "use_cache": bool(rank)},
        "seed": good,
    }[kind]
    if kind.endswith("on one") and rank:
        bad = {"input_ids": ids}
    torch.manual_seed(rank if kind == "seed" else 0)
    told = refusal(lambda: model(**bad))
    torch.manual_seed(0)
    model(**good).loss.backward()
    return told, all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("content", "input_ids"),
        ("labels", "labels"),
        ("length", "input_ids"),
        ("rows", "input_ids"),
        ("dtype", "input_ids"),
        ("mask on one", "attention_mask"),
        ("labels on one", "labels"),
        ("flag", "use_cache"),
        ("seed", "random"),
    ],
)
def test_unlike_batches_are_refused(ranks, kind, named, size):
    """All ranks are told the argument and each rank's value; the next forward works."""
    for told, works_after in ranks(size).run(batches, kind):
        assert "tp ranks were fed different batches" in told
        assert "shard data by dp_rank" in told
        assert named in told
        assert "on rank 0" in told
        assert "on rank 1" in told
        assert works_after


def unlike_models(kind: str) -> str:
    """What ranks are told that hold different models before sharding."""
    rank = torch.distributed.get_rank()

    def build_own() -> Any:
        case = Case(config={"n_layer": 1 + rank}) if kind == "layers" else Case()
        if kind == "dtype" and rank:
            case = case.but(dtype=torch.float32)
        return build(case, parallel=True, seed=rank if kind == "seed" else 0)

    def finished() -> Any:
        model = build(Case(), parallel=False)
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.mul_(1 + rank)
        return tensorpar.parallelize(model)

    return refusal(finished if kind == "weights" else build_own)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("seed", "wte.weight"),
        ("layers", "c_proj.weight"),
        ("dtype", "torch.float32"),
        ("weights", "c_fc.weight"),
    ],
)
def test_unlike_models_are_refused_before_sharding(ranks, kind, named):
    """Ranks with another seed, size, dtype or weights all learn which parameter differs."""
    for told in ranks(2).run(unlike_models, kind):
        assert "tensor-parallel ranks hold different models" in told
        assert named in told
        assert "on rank 1" in told


class Broken(nn.Module):
    """A module whose plan names what it does not have."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.up, self.down, self.heads = nn.Linear(8, 12), nn.Linear(12, 8), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two linears."""
        return self.down(self.up(x))


PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "child": ({"upp": tensorpar.Column()}, "has no child ['upp']"),
    "heads": ({"up": tensorpar.Column(heads="num_heads")}, "num_heads"),
    "divide": ({"up": tensorpar.Column(), "divide": ("size",)}, "size"),
    "enter": ({"up": tensorpar.Column(), "enter": ("hidden_states",)}, "['hidden_states']"),
    "indivisible": ({"up": tensorpar.Column(heads="heads")}, "12"),
}


def broken_plan(kind: str) -> tuple[str, bool]:
    """What a plan that does not fit is told, and whether the module is as it was."""
    tensorpar.register(Broken, **PLANS[kind][0])
    try:
        torch.manual_seed(0)
        module = Broken(5)
        told = refusal(lambda: tensorpar.parallelize(module), Exception)
        untouched = type(module.up) is nn.Linear and type(module.up.weight) is nn.Parameter
        return told, untouched
    finally:
        tensorpar.unregister(Broken)


@pytest.mark.parametrize("kind", PLANS)
def test_plans_that_do_not_fit_are_refused(ranks, kind):
    """A missing child, attribute, argument or a size that does not divide is named by all ranks."""
    for told, untouched in ranks(2).run(broken_plan, kind):
        assert PLANS[kind][1] in told, told
        assert untouched


def registered_twice() -> list[str]:
    """What registering a class again is told, by class and by name."""
    tensorpar.register(Broken, up=tensorpar.Column())
    try:
        name = f"{Broken.__module__}.{Broken.__qualname__}"
        return [
            refusal(lambda: tensorpar.register(Broken, up=tensorpar.Column())),
            refusal(lambda: tensorpar.register(name, up=tensorpar.Column())),
            refusal(lambda: tensorpar.tp_register_with_module(Broken, Broken)),
            refusal(
                lambda: tensorpar.register(
                    "transformers.models.gpt2.modeling_gpt2.GPT2MLP", c_fc=tensorpar.Column()
                )
            ),
        ]
    finally:
        tensorpar.unregister(Broken)


def test_a_class_is_registered_once(ranks):
    """Registering again, by class or dotted name, is refused and names the remedy."""
    for told in ranks(2).run(registered_twice):
        assert all("is registered already; tensorpar.unregister it first" in one for one in told)


def stale_optimizer(parallelize: str) -> str:
    """What an optimizer is told that was built before the model became parallel."""
    model = build(Case(), parallel=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if parallelize == "wrapper":
        tensorpar.set_tensor_parallelism(model)
        tensorpar.DistributedModel(model)
    else:
        tensorpar.parallelize(model)
    model(**batch(Case())).loss.backward()
    return refusal(optimizer.step, RuntimeError)


@pytest.mark.parametrize("parallelize", ["function", "wrapper"])
def test_an_optimizer_built_too_early_is_refused(ranks, parallelize):
    """Stepping an optimizer that holds replaced parameters raises instead of training nothing."""
    for told in ranks(2).run(stale_optimizer, parallelize):
        assert "build the optimizer after the model is parallel" in told


def idle_warnings() -> list[str]:
    """The warnings of building a model that leaves ranks without a head."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(Case(), parallel=True)
        build(Case(config={"n_head": 4}), parallel=True)
    return [str(one.message) for one in caught if "without a head" in str(one.message)]


def test_idle_ranks_are_no_error(ranks):
    """A rank without a head works; one warning on one rank names the idle ones."""
    first, *others = ranks(4).run(idle_warnings)
    assert others == [[]] * 3
    (told,) = first
    assert "GPT2Attention (5 heads): ranks [3]" in told


def options() -> list[str]:
    """What unknown or wrong options are told."""
    model = transformers.GPT2Model(config(Case("GPT2Model")))
    return [
        refusal(lambda: tensorpar.tensor_parallelism(check_batch=True).__enter__()),
        refusal(lambda: tensorpar.tensor_parallelism(check_batches=1).__enter__(), TypeError),
        refusal(lambda: tensorpar.set_tensor_parallelism(model, sequence=True)),
    ]


def test_unknown_options_are_refused(ranks):
    """Options that do not exist, or are not booleans, are refused with those that do."""
    for first, second, third in ranks(2).run(options):
        assert "unknown options ['check_batch']" in first
        assert "check_batches" in first
        assert "check_batches = 1" in second
        assert "['sequence']" in third


def unchecked() -> bool:
    """A forward of unlike batches with the check turned off."""
    torch.manual_seed(0)
    with tensorpar.tensor_parallelism(check_batches=False):
        model = transformers.GPT2LMHeadModel(config(Case()))
    return bool(model(_own(batch(Case())["input_ids"])).logits.isfinite().all())


def test_the_batch_check_can_be_turned_off(ranks):
    """`check_batches=False` compares nothing."""
    assert ranks(2).run(unchecked) == [True, True]


def later_steps(num_good: int) -> tuple[bool, str]:
    """Unlike content, then unlike shapes, after some good steps."""
    model = build(Case(), parallel=True)
    ids = batch(Case())["input_ids"]
    for _ in range(num_good):
        model(ids)
    accepted = True
    try:
        model(_own(ids))
    except ValueError:
        accepted = False
    return accepted, refusal(lambda: model(ids[:, : 11 - tensorpar.tp_rank()]))


@pytest.mark.parametrize(("num_good", "accepted"), [(9, False), (10, True)])
def test_content_is_compared_on_the_first_ten_steps(ranks, num_good, accepted):
    """After ten steps only shapes are compared, still on every forward."""
    for was_accepted, told in ranks(2).run(later_steps, num_good):
        assert was_accepted == accepted
        assert "[3, 10]" in told
