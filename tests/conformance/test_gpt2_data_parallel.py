"""Data parallelism beside tensor parallelism, by torch's own means on tensorpar's mesh."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import tensorpar
from tests.conformance.gpt2 import (
    DROPOUT,
    Case,
    Tensors,
    batch,
    build,
    detached,
    perturbed,
    require_close,
    require_equal_ranks,
    weights_of,
)

CASE = Case(labels=False)


def two_steps(fsdp: bool) -> Tensors:
    """Losses and weights of two clipped steps, each data-parallel rank on its rows."""
    model = perturbed(CASE, parallel=fsdp)
    rows = slice(0, 2)
    if fsdp:
        for block in model.transformer.h:
            fully_shard(block, mesh=tensorpar.dp_mesh())
        fully_shard(model, mesh=tensorpar.dp_mesh())
        rows = slice(tensorpar.dp_rank(), tensorpar.dp_rank() + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = batch(CASE)["input_ids"][rows]
    seen: Tensors = {}
    for step in range(2):
        optimizer.zero_grad()
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if fsdp:
            dist.all_reduce(loss := loss.detach() / 2, group=tensorpar.dp_mesh().get_group())
            norm = norm.full_tensor()
        seen |= detached({"loss": loss, "norm": norm}, str(step))
    return seen | detached(weights_of(model), "weight")


def test_fully_shard_on_the_dp_axis(ranks):
    """FSDP2 over dp 2 and tensor parallelism over tp 2 equal one process on the whole batch."""
    results = ranks(4, tensor_parallel_degree=2).run(two_steps, True)
    require_equal_ranks(results)
    require_close(results[0], two_steps(False), 1e-9)


def streams() -> tuple[int, torch.Tensor, torch.Tensor]:
    """This rank's data-parallel rank and what dropout made of one batch, twice from one seed."""
    model = build(Case(config=DROPOUT), parallel=True).train()
    outputs = []
    for _ in range(2):
        torch.manual_seed(tensorpar.dp_rank())
        outputs.append(model(batch(CASE)["input_ids"]).logits.detach())
    return tensorpar.dp_rank(), outputs[0], outputs[1]


def test_data_parallel_ranks_drop_out_on_their_own(ranks):
    """Dropout agrees among tensor-parallel ranks and differs between data-parallel ones."""
    results = ranks(4, tensor_parallel_degree=2).run(streams)
    first = {dp: x for dp, x, _ in results}
    for dp, x, again in results:
        assert torch.equal(x, again)
        assert torch.equal(x, first[dp])
    assert not torch.equal(first[0], first[1])
    assert len(first) == 2
