"""Degrees that do not divide the real head counts: 12 heads on 8 ranks, 25 on 2, 4 and 8."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import tensorpar
from tests.conformance.families import (
    CASES,
    EXACT,
    build,
    build_causal,
    generated,
    inputs,
    outputs_and_gradients,
)
from tests.conformance.gpt2 import Tensors, refusal, require_close, require_equal_ranks
from tests.conformance.test_generation import prompt

#: as many heads as GPT-2 small and BERT base have, and GPT-2 XL, narrow and shallow.
SMALL = {"heads": 12, "head_size": 4, "inner": 50}
XL = {"heads": 25, "head_size": 2, "inner": 50}


def used(family: str, config: dict[str, int], parallel: bool) -> Tensors:
    """Outputs and gradients, and greedily decoded tokens."""
    options = {"config": config, "fused_attention": False}
    found = outputs_and_gradients(family, CASES[family].model, parallel, options)
    model = build_causal(family, parallel=parallel, **options).eval()
    return found | generated(model, prompt(), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    ("family", "config", "size"),
    [
        pytest.param(family, config, size, marks=pytest.mark.feature(feature))
        for family, config, size, feature in (
            ("gpt2", XL, 2, "25 heads on 2, 4 and 8 ranks"),
            ("gpt2", XL, 4, "25 heads on 2, 4 and 8 ranks"),
            ("gpt2", XL, 8, "25 heads on 2, 4 and 8 ranks"),
            *((family, SMALL, 8, "12 heads on 8 ranks") for family in CASES),
        )
    ],
)
def test_degree(ranks, family, config, size):
    """Ranks with fewer heads than others, or none, compute what one process does."""
    results = ranks(size).run(used, family, config, True)
    require_equal_ranks(results)
    reference = used(family, config, False)
    logits = {"logits": results[0].pop("logits")}
    require_close(logits, {"logits": reference.pop("logits")}, 1e-5)
    require_close(results[0], reference, EXACT)


def without_a_head() -> tuple[dict[str, str], bool]:
    """Five heads at degree 4, told in both ways to torch; whether evaluation is left alone."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True)
    told = {
        "fsdp": refusal(lambda: tensorpar.DistributedModel(model, data_parallel="fsdp")),
        "replicate": refusal(lambda: tensorpar.DistributedModel(model, data_parallel="replicate")),
    }
    for block in model.transformer.h:
        fully_shard(block, mesh=tensorpar.dp_mesh())
    fully_shard(model, mesh=tensorpar.dp_mesh())
    given = inputs("GPT2LMHeadModel", labels=True)
    told["by hand"] = refusal(lambda: model.train()(**given))
    with torch.no_grad():
        loss = model.eval()(**given).loss
    return told, bool(loss.isfinite())


def test_a_rank_without_a_head_is_refused(ranks):
    """On all ranks, where FSDP2 would fail on that one, in backward."""
    for told, evaluates in ranks(8, tensor_parallel_degree=4).run(without_a_head):
        for told_to in told.values():
            assert (
                "leaves a rank without a part of its 5 along dim 1 at tensor_parallel_degree = 4"
                in told_to
            )
        assert evaluates
