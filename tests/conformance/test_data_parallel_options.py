"""What can be chosen of data parallelism: memory, precision, and when gradients are reduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor.debug import CommDebugMode

import tensorpar
from tests.conformance.families import BEHIND_FLOAT32, CASES, build, inputs
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    require_close,
    require_equal_ranks,
    weights_of,
)
from tests.conformance.test_data_parallel import ROWS, trained


def options(kind: str, changes: Mapping[str, Any]) -> Tensors:
    """Training with one option of `DataParallel` changed."""
    return trained("gpt2", tensorpar.DataParallel(kind, **changes))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("fsdp", {"reshard_after_forward": False}), ("fsdp", {"cpu_offload": True})],
)
def test_options_change_no_number(ranks, kind, changes):
    """What is freed or kept on the host is a matter of memory."""
    results = ranks(4, tensor_parallel_degree=2).run(options, kind, changes)
    require_close(results[0], trained("gpt2", None), BEHIND_FLOAT32)


def gathered_in_backward(reshard: bool) -> int:
    """How many units are gathered again in backward."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True).train()
    given = inputs("GPT2LMHeadModel", labels=True)
    chosen = tensorpar.DataParallel("fsdp", reshard_after_forward=reshard)
    model = tensorpar.DistributedModel(model, data_parallel=chosen)
    loss = model(**given).loss
    with CommDebugMode() as mode:
        loss.backward()
    return sum(n for op, n in mode.get_comm_counts().items() if "gather" in str(op))


def test_blocks_are_freed_until_backward(ranks):
    """Unless `reshard_after_forward=False` keeps them: two blocks and the rest."""
    pool = ranks(4, tensor_parallel_degree=2)
    assert set(pool.run(gathered_in_backward, True)) == {3}
    assert set(pool.run(gathered_in_backward, False)) == {0}


def offload_policies() -> list[Any]:
    """What torch is asked for, unit by unit, with `cpu_offload` and without."""
    asked: list[Any] = []

    def note(unit: torch.nn.Module, **options: Any) -> None:
        asked.append(type(options["offload_policy"]))

    functions = {
        "fsdp": "torch.distributed.fsdp.fully_shard",
        "replicate": "torch.distributed._composable.replicate_with_fsdp.replicate",
    }
    for kind, function in functions.items():
        for offload in (True, False):
            with mock.patch(function, note):
                chosen = tensorpar.DataParallel(kind, cpu_offload=offload)
                model = build("gpt2", "GPT2LMHeadModel", parallel=True)
                tensorpar.DistributedModel(model, data_parallel=chosen)
    return asked


def test_offloading_is_asked_for(ranks):
    """Of every unit; on a machine without accelerator nothing else can be seen of it."""
    for asked in ranks(4, tensor_parallel_degree=2).run(offload_policies):
        assert asked == ([CPUOffloadPolicy] * 3 + [OffloadPolicy] * 3) * 2


def mixed(kind: str) -> dict[str, tuple[set[torch.dtype], set[torch.dtype], float]]:
    """For every family dtypes inside the blocks and of parameters that are stepped, and a loss."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {}
    for family, case in CASES.items():
        model = build(family, case.model, parallel=True, dtype=torch.float32)
        model = tensorpar.DistributedModel(
            model, data_parallel=tensorpar.DataParallel(kind, mixed_precision=policy)
        )
        inside: set[torch.dtype] = set()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda *given, x=inside: x.add(given[-1].dtype))
        loss = model(**inputs(case.model, labels=True)).loss
        loss.backward()
        torch.optim.AdamW(model.parameters(), fused=True).step()
        found[family] = inside, {p.dtype for p in model.parameters()}, loss.item()
    return found


@pytest.mark.parametrize(("size", "kind"), [(4, "fsdp"), (4, "replicate"), (2, "fsdp")])
def test_mixed_precision_keeps_float32_master_weights(ranks, size, kind):
    """bfloat16 in forward, float32 in what the optimizer sees; at data-parallel size 1 as well."""
    every = ranks(size, tensor_parallel_degree=2).run(mixed, kind)
    for family, case in CASES.items():
        reference = build(family, case.model, parallel=False)
        expected = reference(**inputs(case.model, labels=True)).loss.item()
        for inside, parameters, loss in (found[family] for found in every):
            assert inside == {torch.bfloat16}
            assert parameters == {torch.float32}
            assert loss == pytest.approx(expected, rel=0.02)


def collectives_over_dp(kind: str) -> tuple[int, int]:
    """How many collectives of backward are over data-parallel ranks, without and with sync."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True).train()
    tensor_parallel = counted_backward(model)
    model = tensorpar.DistributedModel(model, data_parallel=kind)
    counted_backward(model)
    with model.no_sync():
        unsynced = counted_backward(model)
    return unsynced - tensor_parallel, counted_backward(model) - tensor_parallel


def counted_backward(model: torch.nn.Module) -> int:
    """Reductions of one backward."""
    loss = model(**inputs("GPT2LMHeadModel", labels=True)).loss
    with CommDebugMode() as mode:
        loss.backward()
    reductions = (n for op, n in mode.get_comm_counts().items() if "gather" not in str(op))
    return sum(reductions)


@pytest.mark.parametrize("kind", ["fsdp", "replicate"])
def test_skipped_steps_reduce_nothing(ranks, kind):
    """Within `no_sync` gradients stay where they are; after it one reduction a unit."""
    for unsynced, synced in ranks(4, tensor_parallel_degree=2).run(collectives_over_dp, kind):
        assert unsynced == 0
        assert synced == 3  # two blocks and the rest


def accumulated(kind: str | None) -> Tensors:
    """Weights after a step on two micro-batches, the first within `no_sync`."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=kind is not None).train()
    given = inputs("GPT2LMHeadModel", labels=True)
    if kind is None:
        for row in (0, 1, 2, 1):
            (model(**{name: x[[row]] for name, x in given.items()}).loss / 4).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return detached(weights_of(model), "weight")
    parallel = tensorpar.DistributedModel(model, data_parallel=kind)
    own = ROWS[tensorpar.dp_rank()]
    with parallel.no_sync():
        (parallel(**{name: x[[own[0]]] for name, x in given.items()}).loss / 2).backward()
    (parallel(**{name: x[[own[1]]] for name, x in given.items()}).loss / 2).backward()
    torch.optim.SGD(parallel.parameters(), lr=0.1).step()
    return detached(weights_of(parallel.module), "weight")


@pytest.mark.parametrize("kind", ["fsdp", "replicate"])
def test_gradients_accumulate_without_sync(ranks, kind):
    """The step after `no_sync` is that of all micro-batches on all ranks."""
    results = ranks(4, tensor_parallel_degree=2).run(accumulated, kind)
    require_equal_ranks(results)
    require_close(results[0], accumulated(None), BEHIND_FLOAT32)
