"""Data beside tensor parallelism: 2 x 2 ranks train as one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed._composable.replicate import replicate as replicate_by_ddp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import tensorpar
from tests.conformance.families import BEHIND_FLOAT32, CASES, build, inputs
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)

#: rows of the batch of 3 that has padding in row 1; by data-parallel rank, then by accumulation.
ROWS = ((0, 1), (2, 1))

#: what torch has, and Transformers; each trains a part of every model.
OPTIMIZERS: tuple[Callable[[Any], torch.optim.Optimizer], ...] = (
    # a large eps: Adam divides by roots of squares, which blows rounding up where they are tiny
    lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3, fused=True),
    lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3, foreach=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(1e-5, 1e-3)),
    lambda p: transformers.optimization.Adafactor(p, eps=(1e-8, 1e-3)),
)


def dealt(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers, to which the parameters are dealt at random, weights and biases alike."""
    parameters = list(model.parameters())
    order = torch.randperm(len(parameters), generator=torch.Generator().manual_seed(0)).tolist()
    number = len(OPTIMIZERS)
    return [
        optimizer([parameters[i] for i in order[place::number]])
        for place, optimizer in enumerate(OPTIMIZERS)
    ]


def by_hand(model: torch.nn.Module) -> torch.nn.Module:
    """What a user of torch writes who does not know of `DistributedModel`."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2].isdigit():
            fully_shard(module, mesh=tensorpar.dp_mesh())
    return fully_shard(model, mesh=tensorpar.dp_mesh())


def trained(family: str, way: Any) -> Tensors:
    """Losses, norms and weights of two clipped steps of two micro-batches each.

    Args:
        family: a key of `CASES`.
        way: `"by hand"`, an argument `data_parallel` of `DistributedModel`, or None: one process
            on all rows.
    """
    head = CASES[family].model
    model = build(family, head, parallel=way is not None).train()
    if way == "by hand":
        model = by_hand(model)
    elif way is not None:
        model = tensorpar.DistributedModel(model, data_parallel=way)
    own = ROWS if way is None else ROWS[tensorpar.dp_rank() : tensorpar.dp_rank() + 1]
    given = inputs(head, labels=True)
    optimizers = dealt(model)
    seen: Tensors = {}
    for step in range(2):
        losses = []
        for rows in zip(*own, strict=True):
            parts = [{name: x[[row]] for name, x in given.items()} for row in rows]
            loss = torch.stack([model(**part).loss for part in parts]).mean() / 2
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        total = torch.stack(losses).sum()
        if way is not None:
            dist.all_reduce(total.div_(2), group=tensorpar.dp_mesh().get_group())
        seen |= detached({"loss": total, "norm": whole(norm)}, str(step))
    return seen | detached(weights_of(getattr(model, "module", model)), "weight")


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.feature("data parallel: fully_shard and replicate, every stock optimizer")
@pytest.mark.parametrize("way", ["fsdp", "replicate"])
@pytest.mark.parametrize("family", sorted(CASES))
def test_law_parity_at_two_by_two(ranks, family, way):
    """Losses, gradient norms and weights equal one process's, gradients accumulated."""
    results = ranks(4, tensor_parallel_degree=2).run(trained, family, way)
    require_equal_ranks(results)
    require_close(results[0], trained(family, None), BEHIND_FLOAT32)


@pytest.mark.parametrize(
    ("way", "strategy"), [("by hand", "cluster"), ("by hand", "spread"), ("fsdp", "spread")]
)
def test_other_ways(ranks, way, strategy):
    """`fully_shard` without tensorpar's wrapper, and tensor-parallel ranks that lie apart."""
    pool = ranks(4, tensor_parallel_degree=2, placement_strategy=strategy)
    results = pool.run(trained, "gpt2", way)
    require_equal_ranks(results)
    require_close(results[0], trained("gpt2", None), BEHIND_FLOAT32)


def refused() -> Mapping[str, str]:
    """What is said to batches of different sizes, to classic DDP, and to a kind that is none."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True).train()
    other = build("gpt2", "GPT2LMHeadModel", parallel=True).train()  # it comes out damaged
    given = inputs("GPT2LMHeadModel", labels=True)
    rows = slice(0, 2 + tensorpar.dp_rank())
    told = {
        "DDP": refusal(lambda: torch.nn.parallel.DistributedDataParallel(model)),
        "old replicate": refusal(lambda: replicate_by_ddp(other)(**given)),
        "kind": refusal(lambda: tensorpar.DistributedModel(model, data_parallel="ddp")),
    }
    wrapped = tensorpar.DistributedModel(model, data_parallel="replicate")
    uneven = {name: x[rows] for name, x in given.items()}
    return told | {"rows": refusal(lambda: wrapped(**uneven))}


def test_what_would_go_wrong_silently_is_refused(ranks):
    """Uneven batches and wrappers that do not know DTensors end in an error on every rank."""
    for told in ranks(4, tensor_parallel_degree=2).run(refused):
        assert "input_ids = 2 on rank 0, 3 on rank 1" in told["rows"]
        assert "drop_last=True" in told["rows"]
        assert 'data_parallel="replicate"' in told["DDP"]
        assert 'data_parallel="replicate"' in told["old replicate"]
        assert "data_parallel = 'ddp'" in told["kind"]


def by_config(config: Mapping[str, Any]) -> str:
    """The kind that `DistributedModel` takes from the configuration dict."""
    tensorpar.init({"tensor_parallel_degree": 2, "prescaled_batch": True, **config})
    model = tensorpar.DistributedModel(build("gpt2", "GPT2LMHeadModel", parallel=True))
    return type(model.module).__name__


def test_the_configuration_chooses(ranks):
    """`ddp` averages gradients; `shard_optimizer_state` shards as well."""
    pool = ranks(4, init=False)
    assert set(pool.run(by_config, {})) == {"GPT2LMHeadModel"}
    assert set(pool.run(by_config, {"ddp": True})) == {"ReplicateGPT2LMHeadModel"}
    sharded = pool.run(by_config, {"ddp": True, "shard_optimizer_state": True})
    assert set(sharded) == {"FSDPGPT2LMHeadModel"}


def exported(kind: str, folder: str) -> torch.Tensor:
    """Save a data-parallel model; greedy tokens of a prompt whose length the dp rank decides."""
    model = tensorpar.DistributedModel(
        build("gpt2", "GPT2LMHeadModel", parallel=True).eval(), data_parallel=kind
    )
    model.save_pretrained(folder)
    prompt = inputs("GPT2LMHeadModel", labels=False)["input_ids"][:1, : 3 + tensorpar.dp_rank()]
    return model.generate(prompt, max_length=9, do_sample=False, pad_token_id=1)


@pytest.mark.parametrize("kind", ["fsdp", "replicate"])
def test_export_and_generation(ranks, tmp_path, kind):
    """A data-parallel model is saved as Transformers' own, and each dp rank generates its own."""
    from transformers import AutoModelForCausalLM

    results = ranks(4, tensor_parallel_degree=2).run(exported, kind, str(tmp_path))
    plain = build("gpt2", "GPT2LMHeadModel", parallel=False).eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(plain)
    require_close(detached(weights_of(loaded), ""), detached(weights_of(plain), ""), 0.0)
    prompt = inputs("GPT2LMHeadModel", labels=False)["input_ids"][:1]
    for rank, tokens in enumerate(results):
        own = prompt[:, : 3 + rank // 2]
        expected = plain.generate(own, max_length=9, do_sample=False, pad_token_id=1)
        assert torch.equal(tokens, expected)


def overflowing(kind: str | None, way: type[torch.optim.Optimizer]) -> list[tuple[bool, float]]:
    """Whether each of two scaled steps is skipped, and the scale after; rank 1 overflows once."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True, dtype=torch.float32)
    parallel = tensorpar.DistributedModel(model, data_parallel=kind)
    optimizer = way(parallel.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    overflows = [tensorpar.rank() == 1, False]

    def overflow(_module: object, _given: object, output: torch.Tensor) -> None:
        if overflows.pop(0):
            output.register_hook(lambda gradient: gradient * torch.inf)

    model.transformer.h[0].mlp.c_fc.register_forward_hook(overflow)
    seen = []
    for _ in range(2):
        before = weights_of(model)
        with torch.autocast("cpu", torch.float16):
            loss = parallel(**inputs("GPT2LMHeadModel", labels=True)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = weights_of(model)
        seen.append(
            (all(torch.equal(after[name], x) for name, x in before.items()), scaler.get_scale())
        )
    return seen


@pytest.mark.parametrize(
    ("size", "kind", "way"),
    [
        (2, None, torch.optim.SGD),
        (2, None, torch.optim.Adafactor),
        (4, "fsdp", torch.optim.SGD),
        (4, "replicate", torch.optim.SGD),
    ],
)
def test_overflow_on_one_rank_skips_the_step_on_all(ranks, size, kind, way):
    """Autocast to float16: torch's `GradScaler` sees the infinity of any rank on every rank."""
    for steps in ranks(size, tensor_parallel_degree=2).run(overflowing, kind, way):
        assert steps == [(True, 512.0), (False, 512.0)]
