"""`reproducible_dropout=True`: with dropout on, any degree has the losses of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tensorpar
from tensorpar.reproducible import refuse_unknown_order
from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    EXACT,
    IN_FLOAT32,
    build,
    inputs,
    probe,
)
from tests.conformance.gpt2 import (
    Tensors,
    checkpoint_activations,
    detached,
    gradients_of,
    require_close,
    require_equal_ranks,
    scale_of,
    weights_of,
)

P = 0.3
#: attention, and whether and how blocks are recomputed in backward.
VARIANTS = [("eager", None), ("eager", True), ("sdpa", None), ("sdpa", False)]


def with_dropout(family: str, implementation: str, *, parallel: bool, **options: Any) -> Any:
    """A perturbed float64 model in training, every dropout on."""
    model = build(family, CASES[family].model, parallel=parallel, **options).train()
    model.config._attn_implementation = implementation
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = P
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, P)
    return model


def three_steps(
    family: str, implementation: str, reentrant: bool | None, parallel: bool, **options: Any
) -> Tensors:
    """Losses of three clipped steps, gradients of the last, weights, and the stream's end."""
    options = {"reproducible_dropout": True, **options}
    model = with_dropout(family, implementation, parallel=parallel, **options)
    if reentrant is not None:
        checkpoint_activations(model, {"use_reentrant": reentrant})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    given = inputs(CASES[family].model, labels=False)
    torch.manual_seed(5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = probe(model(**given), given["attention_mask"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    found = {"losses": torch.stack(losses), "next random number": torch.rand(2)}
    labelled = model(**inputs(CASES[family].model, labels=True)).loss
    found["own loss"] = labelled.detach().double()
    return found | detached(gradients_of(model), "gradient") | detached(weights_of(model), "weight")


def all_variants(family: str, parallel: bool) -> dict[str, Tensors]:
    """Three steps under each attention that Transformers has for the family."""
    return {
        f"{implementation} {reentrant}": three_steps(family, implementation, reentrant, parallel)
        for implementation, reentrant in VARIANTS
        if implementation == "eager" or family not in IN_FLOAT32
    }


@pytest.fixture(scope="module")
def one_process() -> Callable[[str], dict[str, Tensors]]:
    """What one process finds, worked out once a family."""
    found: dict[str, dict[str, Tensors]] = {}

    def find(family: str) -> dict[str, Tensors]:
        if family not in found:
            found[family] = all_variants(family, False)
        return found[family]

    return find


def require_alike(results: Sequence[Tensors], reference: Tensors, tolerance: float) -> None:
    """Ranks equal each other bit for bit, and the reference as its precision allows."""
    require_equal_ranks(list(results))
    scale = scale_of({"losses": reference["losses"]})
    ours, own = dict(results[0]), dict(reference)
    assert torch.equal(ours.pop("next random number"), own.pop("next random number"))
    torch.testing.assert_close(
        ours.pop("own loss"), own.pop("own loss"), rtol=0, atol=BEHIND_FLOAT32 * scale
    )
    require_close(ours, own, tolerance * scale)


@pytest.mark.feature("reproducible dropout")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(CASES))
def test_losses_and_gradients_of_one_process(ranks, one_process, family, size):
    """Eager and sdpa, recomputed or not, an idle rank included: every draw is one process's."""
    results = ranks(size).run(all_variants, family, True)
    tolerance = BEHIND_FLOAT32 if family in IN_FLOAT32 else EXACT
    for variant, reference in one_process(family).items():
        require_alike([result[variant] for result in results], reference, tolerance)


def fused_or_not(family: str) -> tuple[Tensors, Tensors]:
    """Three steps with the fused attention on, as it is by default, and off."""
    return (
        three_steps(family, "eager", None, True),
        three_steps(family, "eager", None, True, fused_attention=False),
    )


@pytest.mark.parametrize("family", sorted(IN_FLOAT32))
def test_nothing_is_fused_where_draws_must_be_reproducible(ranks, family):
    """Transformers' own maths runs, float32 scores included: bit for bit that without fusing."""
    for fused, unfused in ranks(2).run(fused_or_not, family):
        require_equal_ranks([fused, unfused])


def own_masks(family: str, checkpointing: bool) -> Tensors:
    """What all heads keep of their attention without the option, and the gradients."""
    model = with_dropout(family, "eager", parallel=True, fused_attention=False)
    if checkpointing:
        checkpoint_activations(model, {"use_reentrant": False})
    given = inputs(CASES[family].model, labels=False)
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    torch.manual_seed(5)
    output = model(**given, output_attentions=True)
    kept = {f"kept/{layer}": weights != 0 for layer, weights in enumerate(output.attentions)}
    output[0].sum().backward()
    return kept | detached(gradients_of(model), "gradient") | {"next": torch.rand(2)}


@pytest.mark.feature("independent dropout masks")
@pytest.mark.parametrize("family", sorted(CASES))
def test_without_the_option_each_rank_draws_its_own(ranks, family):
    """Heads share no mask across ranks or layers, and recomputed blocks draw theirs again."""
    plain = ranks(2).run(own_masks, family, False)
    replayed = ranks(2).run(own_masks, family, True)
    require_equal_ranks(plain)
    require_equal_ranks(replayed)
    recorded = {name for name in plain[0] if name.startswith("kept")}
    gradients = {name: x for name, x in plain[0].items() if name not in recorded}
    again = {name: replayed[0][name] for name in gradients}
    tolerance = BEHIND_FLOAT32 if family in IN_FLOAT32 else 1e-12
    require_close(again, gradients, tolerance * scale_of(gradients))
    masks = [plain[0][name][:, head] for name in sorted(recorded) for head in range(5)]
    assert len(masks) == 2 * 5
    for place, mask in enumerate(masks):
        assert 0.1 < mask.double().mean() < 0.8
        assert not any(torch.equal(mask, other) for other in masks[place + 1 :])


def test_gpus_draw_sdpa_in_an_unknown_order():
    """On GPUs only eager is accepted."""
    refuse_unknown_order(nn.Identity(), "eager", "cuda")
    refuse_unknown_order(nn.Identity(), None, "cuda")
    with pytest.raises(ValueError, match=r"'sdpa' of Identity on cuda, required: one of"):
        refuse_unknown_order(nn.Identity(), "sdpa", "cuda")


def chosen_in_the_configuration() -> tuple[bool, bool, bool]:
    """The option's value where it is a default, where that is overruled, and for a mark."""
    found = []
    for given in ({}, {"reproducible_dropout": False}):
        with tensorpar.tensor_parallelism(**given):
            model = transformers.GPT2Model(CASES["gpt2"].config())
        found.append(model.h[0].attn._tensorpar_module_door.randomness.reproducible)
    model = transformers.GPT2Model(CASES["gpt2"].config())
    tensorpar.set_tensor_parallelism(model)
    tensorpar.DistributedModel(model)
    found.append(model.h[0].attn._tensorpar_module_door.randomness.reproducible)
    return tuple(found)


def test_the_configuration_has_a_default(ranks):
    """`init`'s key is the default of the context and of marks, and an option overrules it."""
    world = ranks(2, reproducible_dropout=True)
    assert world.run(chosen_in_the_configuration) == [(True, False, True)] * 2
