"""`DistributedModel`: gathering state dicts, loading any layout, batches of each rank's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tensorpar
from tensorpar.gathering import hf_layout
from tensorpar.parameters import shard_dim
from tensorpar.partition import unshard
from tests.conformance.gpt2 import (
    Case,
    Tensors,
    batch,
    build,
    detached,
    gradients_of,
    perturbed,
    require_close,
    require_equal_ranks,
    tensors_of,
    weights_of,
)

PLAIN = Case(labels=False)


def wrapped(case: Case = PLAIN) -> tensorpar.DistributedModel:
    """A wrapped parallel model with perturbed weights."""
    return tensorpar.DistributedModel(perturbed(case, parallel=True))


def state_dicts() -> dict[str, Any]:
    """The three state dicts, how each parameter is sharded, and whether they are snapshots."""
    model = wrapped()
    found: dict[str, Any] = {
        "full": model.state_dict(),
        "rank 0": model.state_dict(gather_to_rank0=True),
        "local": model.local_state_dict(),
        "dims": {name: shard_dim(x) for name, x in model.module.state_dict().items()},
        "hf": hf_layout(model.module, model.state_dict()),
    }
    held = {name: x.clone() for name, x in found["full"].items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    found["snapshot"] = all(torch.equal(found["full"][name], x) for name, x in held.items())
    found["compact"] = all(x.untyped_storage().nbytes() == x.nbytes for x in held.values())
    found["local"] = {name: x - 1.0 for name, x in found["local"].items()}
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_state_dicts_are_full_plain_and_in_tensorpar_layout(ranks, size):
    """Gathered dicts are plain snapshots, alike on all ranks; local ones are their shards."""
    results = ranks(size).run(state_dicts)
    require_equal_ranks([one["full"] for one in results])
    full = results[0]["full"]
    assert all(type(x) is torch.Tensor and x.device.type == "cpu" for x in full.values())
    assert all(one["snapshot"] for one in results)
    assert full["transformer.h.0.attn.c_attn.weight"].shape == (3, 5, 8, 40)
    assert full["transformer.h.0.mlp.c_proj.weight"].shape == (40, 83)
    require_equal_ranks([full, results[0]["rank 0"]])
    assert [one["rank 0"] for one in results[1:]] == [{}] * (size - 1)
    for name, x in full.items():
        shards = [one["local"][name] for one in results]
        dim = results[0]["dims"][name]
        joined = shards if dim is None else [unshard(shards, dim)]
        for whole in joined:
            torch.testing.assert_close(whole, x, rtol=0, atol=1e-14)
    reference = perturbed(PLAIN, parallel=False).state_dict()
    require_equal_ranks([reference, results[0]["hf"]])


def loaded(kind: str) -> Tensors:
    """Weights after loading what one process or the model itself holds, in some layout."""
    model = wrapped()
    held = weights_of(model.module)
    with torch.no_grad():
        kept = {name: x.detach().clone() for name, x in model.module.state_dict().items()}
    state_dict = {
        "own": lambda: model.state_dict(),
        "hf": lambda: perturbed(PLAIN, parallel=False).state_dict(),
        "hf, tie once": lambda: {
            name: x
            for name, x in perturbed(PLAIN, parallel=False).state_dict().items()
            if name != "lm_head.weight"
        },
        "own DTensors": lambda: kept,
        "translated": lambda: {
            f"prefix.{name}": x for name, x in perturbed(PLAIN, parallel=False).state_dict().items()
        },
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    options: dict[str, Any] = {}
    if kind == "translated":
        options["translate_function"] = lambda given: {
            name.removeprefix("prefix."): x for name, x in given.items()
        }
    model.load_state_dict(state_dict, **options)
    found = weights_of(model.module)
    assert all(torch.equal(found[name], x) for name, x in held.items())
    assert model.module.lm_head.weight is model.module.transformer.wte.weight
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["own", "hf", "hf, tie once", "own DTensors", "translated"])
def test_loading_is_the_inverse_of_saving(ranks, kind, size):
    """`load_state_dict` of its own dict is the identity, and Transformers' layout is recognised."""
    require_equal_ranks(ranks(size).run(loaded, kind))


def spoiled() -> list[str]:
    """What state dicts that do not fit are told, in both layouts; the model stays as it was."""
    model = wrapped()
    before = weights_of(model.module)
    hf = perturbed(PLAIN, parallel=False).state_dict()
    told = []
    for good in (model.state_dict(), hf):
        bad = dict(good)
        del bad["transformer.ln_f.weight"], bad["transformer.h.0.mlp.c_fc.bias"]
        bad["transformer.surprise"] = torch.zeros(2, 3)
        bad["transformer.wpe.weight"] = torch.zeros(31, 40)
        bad["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(7, 40)
        with pytest.raises(ValueError, match="does not fit the model, 5 keys") as refusal:
            model.load_state_dict(bad)
        told.append(str(refusal.value))
    after = weights_of(model.module)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    return told


def test_a_state_dict_that_does_not_fit_is_refused(ranks):
    """Missing, unknown and misshaped keys are all listed with shapes, and nothing is loaded."""
    for messages in ranks(2).run(spoiled):
        for told in messages:
            assert "transformer.ln_f.weight (40,) is missing" in told
            assert "transformer.h.0.mlp.c_fc.bias (83,) is missing" in told
            assert "transformer.surprise (2, 3) is unknown" in told
            assert "transformer.wpe.weight has shape (31, 40), required (32, 40)" in told
            assert "transformer.h.1.mlp.c_fc.weight has shape" in told


def not_strict() -> dict[str, bool]:
    """Loading a part of the model with `strict=False`."""
    model = wrapped()
    before = weights_of(model.module)
    model.load_state_dict({"transformer.ln_f.bias": torch.full((40,), 3.0), "x": 1}, strict=False)
    after = weights_of(model.module)
    changed = [name for name, x in before.items() if not torch.equal(x, after[name])]
    with pytest.raises(ValueError, match="required"):
        model.load_state_dict({"transformer.ln_f.bias": torch.zeros(39)}, strict=False)
    return {"only what was given": changed == ["transformer.ln_f.bias"]}


def test_loading_in_part(ranks):
    """`strict=False` loads what is given and still checks shapes."""
    for found in ranks(2).run(not_strict):
        assert all(found.values()), found


def surface() -> dict[str, bool]:
    """The methods that scripts call, and attributes of the model inside."""
    model = wrapped(Case())
    inner = model.get_module()
    loss = model(**batch(Case())).loss
    model.backward(loss)
    called: list[Any] = []
    model.register_post_partition_hook(lambda own, nothing: called.append((own, nothing)))
    named = dict(inner.named_parameters())
    return {
        "attributes": model.config is inner.config and model.lm_head is inner.lm_head,
        "gradients": all(p.grad is not None for p in model.parameters()),
        "hook": called == [(model, None)],
        "sharded": model.is_distributed_parameter(named["transformer.wte.weight"]),
        "replicated": not model.is_distributed_parameter(named["transformer.wpe.weight"]),
        "local": {id(p) for p in model.local_parameters()} == {id(p) for p in named.values()},
        "modules": {
            type(m).__name__.removeprefix("BehindDoor") for m in model.distributed_modules()
        }
        == {"GPT2LMHeadModel", "GPT2Model", "GPT2Attention", "GPT2MLP"},
        "generate": model.generate(torch.tensor([[1, 2]]), max_new_tokens=1).shape == (1, 3),
        "missing": not hasattr(model, "nothing_like_this"),
        "train": model.eval().module.training is False,
    }


def test_the_wrapper_reaches_the_model_inside(ranks):
    """Calls, attributes and `generate` reach the model; the script's methods are there."""
    for found in ranks(2).run(surface):
        assert all(found.values()), found


def own_batch(labels: bool, rows: list[int]) -> Tensors:
    """Output, loss and gradients where this rank is fed some rows of the batch only."""
    case = Case(labels=labels)
    model = wrapped(case)
    start, given = sum(rows[: tensorpar.tp_rank()]), rows[tensorpar.tp_rank()]
    own = {name: x[start : start + given] for name, x in batch(case).items()}
    output = model(**own)
    loss = output.loss if labels else output.logits.square().sum()
    loss.backward()
    seen = detached(tensors_of({"logits": output.logits, "loss": loss}), "train")
    with torch.no_grad():
        seen |= detached({"logits": model.eval()(**own).logits}, "eval")
    return seen | detached(gradients_of(model.module), "gradient")


def whole_batch(labels: bool) -> Tensors:
    """The same in one process on the whole batch."""
    case = Case(labels=labels)
    model = perturbed(case, parallel=False)
    output = model(**batch(case))
    loss = output.loss if labels else output.logits.square().sum()
    loss.backward()
    seen = detached({"logits": output.logits, "loss": loss}, "train")
    seen |= detached({"logits": output.logits}, "eval")
    return seen | detached(gradients_of(model), "gradient")


@pytest.mark.parametrize("rows", [[2, 1], [1, 0, 1, 1], [1, 2]])
def test_ranks_with_batches_of_their_own(ranks, rows):
    """Each rank gets its rows of the joined batch's logits; the loss is the joined batch's."""
    results = ranks(len(rows), prescaled_batch=False).run(own_batch, True, rows)
    reference = whole_batch(True)
    logits = torch.cat([one.pop("eval/logits") for one in results])
    torch.testing.assert_close(logits, reference.pop("eval/logits"), rtol=0, atol=1e-10)
    require_equal_ranks(results)
    require_close(results[0], reference, 1e-6)


@pytest.mark.parametrize("rows", [[2, 1], [1, 0, 1, 1]])
def test_losses_of_each_ranks_own_rows(ranks, rows):
    """Losses that the ranks compute from their own rows train every parameter on their mean."""
    results = ranks(len(rows), prescaled_batch=False).run(own_batch, False, rows)
    reference = whole_batch(False)
    for kind in ("train/logits", "eval/logits"):
        logits = torch.cat([one.pop(kind) for one in results])
        torch.testing.assert_close(logits, reference.pop(kind), rtol=0, atol=1e-10)
    total = sum(one.pop("train/loss") for one in results)
    torch.testing.assert_close(total, reference.pop("train/loss"))
    require_equal_ranks(results)
    mean = {name: x / len(rows) for name, x in reference.items()}
    require_close(results[0], mean, 1e-9)


def unlike_batches() -> str:
    """What ranks are told whose batches cannot be joined."""
    model = wrapped(Case())
    with pytest.raises(ValueError, match="pad them to one length") as refusal:
        model(input_ids=torch.zeros(2, 5 + tensorpar.tp_rank(), dtype=torch.int64))
    return str(refusal.value)


def test_batches_that_cannot_be_joined_are_refused(ranks):
    """Unequal sequence lengths are refused on all ranks with every rank's shapes."""
    for told in ranks(2, prescaled_batch=False).run(unlike_batches):
        assert "(5,)" in told
        assert "(6,)" in told


def replicated_wrapper() -> Tensors:
    """A plain user module, wrapped."""
    torch.manual_seed(0)
    model = tensorpar.DistributedModel(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    model(torch.ones(2, 3)).sum().backward()
    return detached({n: p.grad.full_tensor() for n, p in model.named_parameters()}, "gradient")


def test_any_module_can_be_wrapped(ranks):
    """A module without plans becomes replicated and trains."""
    require_equal_ranks(ranks(2).run(replicated_wrapper))


def before_init() -> str:
    """What wrapping before `init` is told."""
    with pytest.raises(RuntimeError, match="is not initialised") as refusal:
        tensorpar.DistributedModel(build(Case("GPT2Model"), parallel=False))
    return str(refusal.value)


def test_wrapping_before_init_is_refused(ranks):
    """Without `init` the wrapper says what to call."""
    assert all("tensorpar.init(" in told for told in ranks(2, init=False).run(before_init))
