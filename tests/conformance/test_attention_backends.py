"""Every attention back end that runs on a CPU, chosen at construction or afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import tensorpar
from tests.conformance import flash_kernel
from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    EXACT,
    IN_FLOAT32,
    build,
    build_causal,
    compared,
    generated,
    inputs,
    tiny_config,
)
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    require_close,
    require_equal_ranks,
    scale_of,
)
from tests.conformance.test_generation import prompt

FLEX = [family for family in sorted(CASES) if family in ("bert", "roberta", "gptneox")]


def computed_with(family: str, attention: str, chosen_later: bool, parallel: bool) -> Tensors:
    """Outputs and gradients with a back end asked for in the config, or after construction."""
    if family in IN_FLOAT32 and not parallel:
        attention, chosen_later = "eager", False  # there is no other in Transformers
    first = {"eager": "sdpa", "sdpa": "eager"}[attention] if chosen_later else attention
    model = build_with(family, first, parallel)
    if chosen_later:
        model.set_attn_implementation(attention)
    given = inputs("", labels=False)
    return compared(model, given, given["attention_mask"])


def build_with(family: str, attention: str, parallel: bool) -> Any:
    """The family's language model; in the context if parallel, where GPT-J may ask for sdpa."""
    reference = build(family, CASES[family].model, parallel=False)
    if not parallel:
        reference.set_attn_implementation(attention)
        return reference
    config = tiny_config(family, attn_implementation=attention)
    fused = attention == "sdpa"
    with default_dtype(torch.float64), tensorpar.tensor_parallelism(fused_attention=fused):
        model = getattr(transformers, CASES[family].model)(config)
    tensorpar.DistributedModel(model).load_state_dict(reference.state_dict())
    return model


@pytest.mark.parametrize("chosen_later", [False, True])
@pytest.mark.parametrize(
    ("attention", "family"),
    [
        pytest.param(name, family, marks=pytest.mark.feature(f"{name} attention"))
        for name in ("eager", "sdpa")
        for family in CASES
    ],
)
def test_attention_back_end(ranks, family, attention, chosen_later):
    """Outputs and gradients equal one process's with the same back end."""
    results = ranks(2).run(computed_with, family, attention, chosen_later, True)
    require_equal_ranks(results)
    reference = computed_with(family, attention, chosen_later, False)
    fused = family in IN_FLOAT32 and attention == "sdpa"
    require_close(results[0], reference, BEHIND_FLOAT32 * scale_of(reference) if fused else EXACT)
    if fused:  # float64 scores instead of Transformers' float32 ones
        assert not torch.equal(results[0]["output/logits"], reference["output/logits"])


def flexed(family: str, parallel: bool) -> Tensors:
    """Outputs with flex attention, whose kernel computes in float32 and has no backward on CPUs."""
    config = {"attn_implementation": "flex_attention"}
    model = build(
        family, CASES[family].model, parallel=parallel, config=config, dtype=torch.float32
    )
    given = inputs("", labels=False)
    # the kernel itself, without the minute that compiling it takes
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model.eval()(**given).logits
    return {"logits": logits * given["attention_mask"][..., None]}


@pytest.mark.feature("flex attention (forward, on CPUs)")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
@pytest.mark.parametrize("family", FLEX)
def test_flex_attention(ranks, family):
    """Block masks and local heads fit."""
    results = ranks(2).run(flexed, family, True)
    require_equal_ranks(results)
    require_close(results[0], flexed(family, False), 1e-5)


def flashed(family: str, parallel: bool) -> tuple[Tensors, set[int]]:
    """Outputs and gradients, with padding and without, and tokens; the kernel's head counts."""
    config = {"attn_implementation": "flash_attention_2"}
    with flash_kernel.installed() as heads:
        model = build_causal(family, parallel=parallel, config=config)
        given = inputs("", labels=False)
        padded = detached(compared(model, given, given["attention_mask"]), "padded")
        model.zero_grad()
        found = compared(model, {"input_ids": given["input_ids"]})
        tokens = generated(model.eval(), prompt(), max_new_tokens=3, do_sample=False)
    assert tokens.pop("logits").isfinite().all()
    return found | padded | tokens, heads


@pytest.mark.feature("flash attention, its kernel replaced by a stand-in")
@pytest.mark.parametrize("family", sorted(CASES))
def test_flash_attention(ranks, family):
    """The kernel gets this rank's heads, or a pretended one, and all else is one process's."""
    results = ranks(4).run(flashed, family, True)
    require_equal_ranks([found for found, _ in results])
    reference, heads = flashed(family, False)
    require_close(results[0][0], reference, EXACT)
    assert heads == {5}
    assert [own for _, own in results] == [{2}, {2}, {1}, {1}]


def asked_for_flash(family: str, parallel: bool) -> str:
    """What a machine without the package answers."""
    config = tiny_config(family, attn_implementation="flash_attention_2")
    with pytest.raises(ImportError) as refusal, tensorpar.tensor_parallelism(parallel):
        getattr(transformers, CASES[family].model)(config)
    return str(refusal.value)


@pytest.mark.parametrize("family", sorted(CASES))
def test_flash_attention_is_refused_as_transformers_does(ranks, family):
    """Flash attention needs its package; without it the context changes nothing about that."""
    reference = ranks(1).run(asked_for_flash, family, False)
    assert ranks(2).run(asked_for_flash, family, True) == reference * 2


class _Scores(TorchDispatchMode):
    """Remembers the most heads of which any operation returned `[batch, heads, 50, 50]`."""

    heads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, tuple | list) else (output,):
            if isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[2:] == (50, 50):
                self.heads = max(self.heads, x.shape[1])
        return output


def score_matrices(family: str, fused: bool) -> int:
    """The most heads for which queries by keys were computed in a training step."""
    config = {"positions": 64}
    model = build_causal(family, parallel=True, config=config, fused_attention=fused).train()
    attention = None if family in IN_FLOAT32 else "sdpa" if fused else "eager"
    if attention:
        model.set_attn_implementation(attention)
    ids = torch.arange(2, 52).repeat(2, 1)
    with _Scores() as scores:
        model(ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    return scores.heads


@pytest.mark.feature("no scores of queries by keys are allocated")
@pytest.mark.parametrize("family", sorted(CASES))
def test_no_score_matrices(ranks, family):
    """With fused attention there is no tensor of heads by queries by keys, only masks."""
    assert all(heads <= 1 for heads in ranks(2).run(score_matrices, family, True))
    assert ranks(2).run(score_matrices, family, False) == [3, 2]
