"""Optimizer state moves between one process and any degree, and training goes on as if it had not.

Weights move as state dicts, moments by `optimizer_state_dict` and `load_optimizer_state_dict`; the
reference is Transformers' model trained in one process by the same stock optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard

import tensorpar
from tensorpar.gathering import gathered_state_dict, hf_layout
from tensorpar.translators import merge_optimizer, optimizer_to_hf
from tests.collectives import Collectives
from tests.conformance.families import CASES, EXACT, build, inputs
from tests.conformance.gpt2 import Tensors, refusal, require_close, require_equal_ranks

ADAMW = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-5}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "amsgrad": lambda groups: torch.optim.AdamW(groups, **ADAMW, amsgrad=True),
    "fused": lambda groups: torch.optim.AdamW(groups, **ADAMW, fused=True),
    "foreach": lambda groups: torch.optim.AdamW(groups, **ADAMW, foreach=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, eps=(1e-5, 1e-3)),
    "Transformers' Adafactor": lambda groups: transformers.optimization.Adafactor(
        groups, lr=1e-2, eps=(1e-8, 1e-3), beta1=0.9, relative_step=False
    ),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
}


def optimizer_of(model: Any, kind: str) -> torch.optim.Optimizer:
    """Decay for weights, none for biases and norms, so that the model's order is torn apart."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if name.endswith("bias") or "ln_" in name or "Norm" in name]
    decayed = [p for _, p in named if all(p is not other for other in plain)]
    return OPTIMIZERS[kind](
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    )


def step(family: str, model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step on a batch of its own; the learning rate is a schedule's.

    The loss is this test's: Transformers' own is computed in float32 and no better than that.
    """
    given = inputs(CASES[family].model, labels=False)
    given["input_ids"] = ids = (given["input_ids"] - 2 + 7 * number) % 95 + 2
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + number)
    logits = model.train()(**given).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def leg(
    family: str, kind: str, parallel: bool, numbers: range, luggage: Any = None
) -> tuple[Tensors, dict[str, Any]]:
    """Steps `numbers` of a run that arrives with weights and moments, and leaves with them."""
    options = {"fused_attention": False} if parallel else {}
    model = build(family, CASES[family].model, parallel=parallel, **options)
    optimizer = optimizer_of(model, kind)
    load = tensorpar.DistributedModel(model).load_state_dict if parallel else model.load_state_dict
    if luggage is not None:
        load(luggage[0])
        if parallel:
            tensorpar.load_optimizer_state_dict(model, optimizer, luggage[1])
        else:
            optimizer.load_state_dict(luggage[1])
    for number in numbers:
        step(family, model, optimizer, number)
    if not parallel:
        return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    weights = gathered_state_dict(model, to_rank0=False, call="test")
    return hf_layout(model, weights), tensorpar.optimizer_state_dict(model, optimizer)


def flat(luggage: tuple[Tensors, dict[str, Any]]) -> Tensors:
    """Weights, moments and steps under names of their own."""
    weights, state_dict = luggage
    state = state_dict["state"]
    return {f"weight/{name}": x for name, x in weights.items()} | {
        f"{index}/{name}": torch.as_tensor(x).double()
        for index in sorted(state)
        for name, x in state[index].items()
    }


def travelled(ranks: Any, family: str, kind: str) -> None:
    """One process, tp 2, tp 4, one process, two steps each, against eight steps in one process."""
    luggage = leg(family, kind, False, range(2))
    for place, size in enumerate((2, 4), 1):
        results = ranks(size).run(leg, family, kind, True, range(2 * place, 2 * place + 2), luggage)
        require_equal_ranks([flat(result) for result in results])
        luggage = results[0]
    arrived = flat(leg(family, kind, False, range(6, 8), luggage))
    stayed = leg(family, kind, False, range(8))
    require_close(arrived, flat(stayed), EXACT)
    options = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in luggage[1]["param_groups"]
    ]
    last = [group | {"lr": 1e-2 / 6} for group in stayed[1]["param_groups"]]
    assert options == last


@pytest.mark.feature("optimizer state moves between degrees")
@pytest.mark.parametrize("family", sorted(CASES))
def test_moments_travel_with_every_family(ranks, family):
    """AdamW with amsgrad and two groups: 2 steps in one process, at tp 2, at tp 4, in one again."""
    travelled(ranks, family, "amsgrad")


@pytest.mark.parametrize(
    "kind", ["fused", "foreach", "momentum", "Adafactor", "Transformers' Adafactor"]
)
def test_moments_travel_with_every_kernel(ranks, kind):
    """Stock fused and foreach AdamW, and SGD with momentum."""
    travelled(ranks, "gpt2", kind)


def parallel_run(kind: str = "amsgrad", steps: int = 1, family: str = "gpt2") -> tuple[Any, Any]:
    """A parallel model and its optimizer after some steps."""
    model = build(family, CASES[family].model, parallel=True, fused_attention=False)
    optimizer = optimizer_of(model, kind)
    for number in range(steps):
        step(family, model, optimizer, number)
    return model, optimizer


def offline(family: str) -> tuple[Any, ...]:
    """What is gathered in both layouts, to rank 0 only, and this rank's shards."""
    model, optimizer = parallel_run(family=family)
    wrapped = tensorpar.DistributedModel(model)
    hf = tensorpar.optimizer_state_dict(wrapped, optimizer)
    ours = tensorpar.optimizer_state_dict(model, optimizer, layout="tensorpar")
    first = tensorpar.optimizer_state_dict(model, optimizer, gather_to_rank0=True)
    shards = copy.deepcopy(tensorpar.local_optimizer_state_dict(wrapped, optimizer))
    kept = flat(({}, copy.deepcopy(hf)))
    step(family, model, optimizer, 1)
    require_equal_ranks([kept, flat(({}, hf))])
    with Collectives() as seen:
        for layout in (hf, ours):
            tensorpar.load_optimizer_state_dict(model, optimizer, layout)
            again = copy.deepcopy(tensorpar.local_optimizer_state_dict(model, optimizer))
            require_equal_ranks([flat(({}, shards)), flat(({}, again))])
    assert seen.counts.total() == 0
    step(family, model, optimizer, 1)
    require_equal_ranks([kept, flat(({}, hf))])
    return hf, ours, first, shards, model.config


@pytest.mark.parametrize("family", ["bert", "gpt2", "gptj"])
def test_shards_merge_offline_to_what_is_gathered(ranks, family):
    """Snapshots; loading communicates nothing; the ranks' dicts translate to the same."""
    results = ranks(4).run(offline, family)
    hf, ours, _, _, config = results[0]
    require_equal_ranks([flat(({}, result[0])) for result in results])
    assert [bool(result[2]) for result in results] == [True, False, False, False]
    require_equal_ranks([flat(({}, hf)), flat(({}, results[0][2]))])
    shards = [result[3] for result in results]
    require_equal_ranks([flat(({}, ours)), flat(({}, merge_optimizer(shards, config)))])
    require_equal_ranks([flat(({}, hf)), flat(({}, optimizer_to_hf(shards, config)))])
    state = hf["state"].values()
    assert all(x.is_contiguous() for held in state for x in held.values())
    shapes = [x["exp_avg"].shape for x in ours["state"].values()]
    assert shapes != [x["exp_avg"].shape for x in state]


def keyed_by_name(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As torch.distributed.checkpoint keys it."""
    groups = copy.deepcopy(state_dict["param_groups"])
    names = {}
    for group in groups:
        names |= dict(zip(group["params"], group["param_names"], strict=True))
        group["params"] = group.pop("param_names")
    return {
        "state": {names[index]: held for index, held in state_dict["state"].items()},
        "param_groups": groups,
    }


def loaded_by_name() -> tuple[Tensors, Tensors]:
    """A dict by name whose groups are in another order, its tied weight under its other name."""
    model, optimizer = parallel_run()
    saved = tensorpar.optimizer_state_dict(model, optimizer)
    given = keyed_by_name(saved)
    given["param_groups"].reverse()
    for group in given["param_groups"]:
        group["params"].reverse()
        if "transformer.wte.weight" in group["params"]:
            group["params"].remove("transformer.wte.weight")
            group["params"].append("lm_head.weight")
    given["state"]["lm_head.weight"] = given["state"].pop("transformer.wte.weight")
    other = optimizer_of(model, "amsgrad")
    tensorpar.load_optimizer_state_dict(model, other, given)
    decays = [group["weight_decay"] for group in other.param_groups]
    assert decays == [0.0, 0.1]
    assert "param_names" not in other.param_groups[0]
    return flat(({}, saved)), flat(({}, tensorpar.optimizer_state_dict(model, other)))


def test_names_count_and_not_the_order(ranks):
    """A dict by name finds its parameters in whatever order it has them, ties included."""
    for saved, again in ranks(2).run(loaded_by_name):
        require_equal_ranks([saved, again])


def not_stepped() -> dict[str, Any]:
    """What an optimizer that has not stepped gives, and whether it has been made to step."""
    model, optimizer = parallel_run(steps=0)
    saved = tensorpar.optimizer_state_dict(model, optimizer)
    assert not optimizer.state
    tensorpar.load_optimizer_state_dict(model, optimizer, saved)
    assert not optimizer.state
    return saved


def test_an_optimizer_that_has_not_stepped_stays_so(ranks):
    """It has no state, and reading or loading it gives it none."""
    for saved in ranks(2).run(not_stepped):
        assert saved["state"] == {}
        assert [len(group["params"]) for group in saved["param_groups"]] == [18, 10]


def beside_fully_shard() -> tuple[Tensors, Tensors]:
    """Gathered from a dp x tp mesh, loaded there, and gathered again."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True, fused_attention=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=tensorpar.dp_mesh())
    fully_shard(model, mesh=tensorpar.dp_mesh())
    optimizer = optimizer_of(model, "fused")
    step("gpt2", model, optimizer, 0)
    saved = tensorpar.optimizer_state_dict(model, optimizer)
    assert "several axes" in refusal(lambda: tensorpar.local_optimizer_state_dict(model, optimizer))
    other = optimizer_of(model, "fused")
    tensorpar.load_optimizer_state_dict(model, other, saved)
    for mine, its in zip(
        optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True
    ):
        for name in ("exp_avg", "exp_avg_sq"):
            assert mine[name].placements == its[name].placements
            assert torch.equal(mine[name].to_local(), its[name].to_local())
    return flat(({}, saved)), flat(({}, tensorpar.optimizer_state_dict(model, other)))


def test_moments_that_fully_shard_has_cut_too(ranks):
    """FSDP2 on the dp axis: the same whole moments as in one process, and back again."""
    results = ranks(4, tensor_parallel_degree=2).run(beside_fully_shard)
    require_equal_ranks([one for result in results for one in result])
    reference = leg("gpt2", "fused", False, range(1))
    require_close(results[0][0], flat(({}, reference[1])), EXACT)
