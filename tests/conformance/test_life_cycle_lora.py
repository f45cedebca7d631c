"""LoRA by peft on parallel models: trained, saved, loaded and merged as in one process."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

import tensorpar
from tests.conformance.families import BEHIND_FLOAT32, CASES, build, inputs
from tests.conformance.gpt2 import (
    Tensors,
    checkpoint_activations,
    detached,
    gradients_of,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)

#: what peft asks of Transformers is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
FEATURE = pytest.mark.feature("LoRA by peft")
#: every linear layer of attention and MLP; the first column layer of each is fused where it can be.
TARGETS = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "bert": ["query", "key", "value", "output.dense", "intermediate.dense"],
    "roberta": ["query", "key", "value", "output.dense", "intermediate.dense"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
    "gptneo": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
    "gptneox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


def lora(family: str, **changes: Any) -> peft.LoraConfig:
    """A config for all linear layers of a family's blocks."""
    given = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], "lora_dropout": 0.0}
    return peft.LoraConfig(**{**given, "fan_in_fan_out": family == "gpt2", **changes})


def perturb_adapters(model: nn.Module) -> None:
    """Move B from zero, through the loading of full tensors, so that A has a gradient."""
    generator = torch.Generator().manual_seed(7)
    state_dict = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = whole_adapters(model)
    moved = {
        name: whole[name] + 0.1 * torch.randn(whole[name].shape, generator=generator).double()
        for name in state_dict
    }
    result = peft.set_peft_model_state_dict(model, moved)
    assert not result.unexpected_keys


def whole_adapters(model: nn.Module) -> Tensors:
    """The adapters under the names of peft's files."""
    return peft.get_peft_model_state_dict(
        model, state_dict=weights_of(model), save_embedding_layers=False
    )


def adapted(family: str, *, parallel: bool, first: bool = False, **changes: Any) -> Any:
    """A model with adapters, from peft before or after it became parallel."""
    model = build(family, CASES[family].model, parallel=parallel and not first)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, lora(family, **changes))
    if parallel and first:
        tensorpar.parallelize(wrapped)
    return wrapped


def trained(model: Any, family: str) -> Tensors:
    """Losses of three clipped steps, the last gradients, and the adapters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.train()(**inputs(CASES[family].model, labels=True)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        losses += [loss.detach().double(), getattr(norm, "full_tensor", lambda n=norm: n)()]
    found = {"losses": torch.stack(losses)}
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    return found | detached(gradients_of(model), "gradient") | detached(weights_of(model), "weight")


def whole_life(family: str, parallel: bool, first: bool) -> Tensors:
    """Initial adapters, training, the file, a model that loads it, and the merged weights."""
    model = adapted(family, parallel=parallel, first=first)
    assert {isinstance(p, DTensor) for p in model.parameters()} == {parallel}
    found = detached(whole_adapters(model), "initial")
    perturb_adapters(model)
    found |= trained(model, family)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    folders: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    if parallel:
        torch.distributed.broadcast_object_list(folders)
    folder = Path(folders[0])
    model.save_pretrained(folder)
    found |= detached(load_file(folder / "adapter_model.safetensors"), "file")
    told = json.loads((folder / "adapter_config.json").read_text())
    assert told["fan_in_fan_out"] == (family == "gpt2")
    base = build(family, CASES[family].model, parallel=parallel)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    batch = inputs(CASES[family].model, labels=False)
    with torch.no_grad():
        found["loaded"] = loaded.eval()(**batch).logits
        merged = loaded.merge_and_unload()
        found["merged"] = merged.eval()(**batch).logits
    found |= detached(weights_of(merged), "merged")
    assert {isinstance(p, DTensor) for p in merged.parameters()} == {parallel}
    return found


@FEATURE
@pytest.mark.parametrize(("size", "first"), [(2, False), (4, True)], ids=["after", "before, at 4"])
@pytest.mark.parametrize("family", sorted(CASES))
def test_adapters_live_as_in_one_process(ranks, family, size, first):
    """Initial values, losses, gradients, files, loading and merging equal one process's."""
    results = ranks(size).run(whole_life, family, True, first)
    require_equal_ranks(results)
    reference = whole_life(family, False, first)
    require_close(results[0], reference, BEHIND_FLOAT32)
    for name, value in reference.items():
        if name.startswith("initial/"):
            assert torch.equal(results[0][name], value), name


def in_many_ways(family: str, parallel: bool) -> Tensors:
    """Two adapters on more than the blocks, with biases; switched, merged, parted and left out."""
    head = {"gpt2": "lm_head", "gptj": "lm_head", "bert": "cls.predictions.decoder"}[family]
    whole = {"gpt2": "ln_f", "gptj": "ln_f", "bert": "cls.predictions.transform.LayerNorm"}[family]
    more = {"target_modules": [*TARGETS[family], head], "modules_to_save": [whole]}
    if family == "bert":
        more["target_modules"].append("transform.dense")  # replicated
    if family == "gptj":  # the layers that have a bias to merge into
        more["target_modules"] = ["fc_in", "fc_out", head]
    more["lora_bias"] = family in ("bert", "gptj")
    # merging into a tied head would change the embedding, in one process too
    untied = build(
        family, CASES[family].model, parallel=False, config={"tie_word_embeddings": False}
    )
    if family == "gpt2":  # weights stored the other way round, sharded and not
        tensorpar.set_tensor_parallelism(untied.transformer.h[0].mlp, False)
    if parallel:
        tensorpar.parallelize(untied)
    torch.manual_seed(5)
    model = peft.get_peft_model(untied, lora(family, use_rslora=True, **more))
    second = {"r": 2, "init_lora_weights": True if more["lora_bias"] else "gaussian"}
    model.add_adapter("second", lora(family, **second, **more))
    batch = inputs(CASES[family].model, labels=False)
    found = {}

    def compute(name: str) -> None:
        with torch.no_grad():
            found[f"logits {name}"] = model.eval()(**batch).logits

    perturb_adapters(model)
    compute("of the first")
    found |= trained(model, family)
    model.set_adapter("second")
    compute("of the second")
    model.set_adapter("default")
    with model.disable_adapter():
        compute("of none")
    model.merge_adapter(safe_merge=True)
    compute("merged")
    model.unmerge_adapter()
    compute("unmerged")
    assert torch.allclose(found["logits merged"], found["logits unmerged"])
    assert not torch.allclose(found["logits of none"], found["logits unmerged"])
    return found


@pytest.mark.filterwarnings(
    "ignore:.*(fan_in_fan_out|have invalid shape).*", "ignore:.*ensure_weight_tying.*"
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*")
@pytest.mark.parametrize("family", ["gpt2", "bert", "gptj"])
def test_several_adapters_on_more_layers(ranks, family):
    """Vocabulary heads, replicated layers, biases, a second adapter and merging in place."""
    results = ranks(2).run(in_many_ways, family, True)
    require_equal_ranks(results)
    require_close(results[0], in_many_ways(family, False), BEHIND_FLOAT32)


def with_dropout(family: str, checkpointing: bool) -> Tensors:
    """Which features LoRA's dropout keeps, on what all ranks share and on this rank's own."""
    model = adapted(family, parallel=True, lora_dropout=0.5).train()
    kept: Tensors = {}
    for name, module in model.named_modules():
        if "lora_dropout.default" in name:

            def note(_: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                kept.setdefault(name, (output != 0)[args[0] != 0].float())

            module.register_forward_hook(note)
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.25  # forks the random state within attention
    model.add_module("unused", nn.Identity())
    if checkpointing:
        model.enable_input_require_grads()
        checkpoint_activations(model.get_base_model())
    torch.manual_seed(9)
    perturb_adapters(model)
    loss = model(**inputs(CASES[family].model, labels=True)).loss
    loss.backward()
    kept["loss"], kept["after"] = loss.detach(), torch.rand(3)
    return kept | detached(gradients_of(model), "gradient")


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_dropout_of_adapters(ranks, family):
    """One mask where ranks share the input, independent ones where features are their own."""
    plain = ranks(2).run(with_dropout, family, False)
    again = ranks(2).run(with_dropout, family, True)
    for first, second in zip(plain, again, strict=True):  # checkpointing replays the masks
        require_close(second, first, 1e-10)
    columns = {"gpt2": ("c_attn", "c_fc"), "gptj": ("q_proj", "k_proj", "v_proj", "fc_in")}[family]
    ours, theirs = plain
    for name, kept in ours.items():
        if "lora_dropout" in name:
            assert 0.4 < kept.mean() < 0.6
            shared = any(part in name for part in columns)
            smaller = min(kept.numel(), theirs[name].numel())
            assert torch.equal(kept[:smaller], theirs[name][:smaller]) == shared, name
    rest = [name for name in ours if "lora_dropout" not in name]
    require_equal_ranks([{name: one[name] for name in rest} for one in plain])


def in_half_precision() -> tuple[set[torch.dtype], float]:
    """Dtypes of the adapters of a bfloat16 model, and its loss after a step, against before."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=True, dtype=torch.bfloat16)
    model = peft.get_peft_model(model, lora("gpt2"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(**inputs("GPT2LMHeadModel", labels=True)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    return dtypes, losses[-1] - losses[0]


def test_adapters_of_a_half_precision_model(ranks):
    """peft keeps adapters in float32, and they train."""
    for dtypes, change in ranks(2).run(in_half_precision):
        assert dtypes == {torch.float32}
        assert change < -0.05


def refusals() -> dict[str, str]:
    """What is said of adapters that do not shard."""

    def ask(**changes: Any) -> str:
        return refusal(lambda: adapted("gpt2", parallel=True, **changes))

    model = build("gpt2", "GPT2LMHeadModel", parallel=True)
    other = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[])
    wrapped = adapted("gpt2", parallel=False, use_dora=True)
    saved, endless = adapted("gpt2", parallel=True), adapted("gpt2", parallel=True)
    if torch.distributed.get_rank() == 1:
        layer = endless.get_base_model().transformer.h[0].attn.c_attn
        layer.lora_B["default"].weight.to_local().data.fill_(torch.inf)
    return {
        "merging": refusal(lambda: endless.merge_adapter(safe_merge=True)),
        "pissa": ask(init_lora_weights="pissa"),
        "dora": ask(use_dora=True),
        "wte": ask(target_modules=["wte"]),
        "ia3": refusal(lambda: peft.get_peft_model(model, other)),
        "first": refusal(lambda: tensorpar.parallelize(wrapped)),
        "main": refusal(lambda: saved.save_pretrained("nowhere", is_main_process=True)),
    }


def test_adapters_that_do_not_shard_are_refused(ranks):
    """Initial values from the weight, DoRA, embeddings and other tuners: a clear error each."""
    for told in ranks(2).run(refusals):
        assert "init_lora_weights = 'pissa', required: one of" in told["pissa"]
        assert "DoraLinearVariant" in told["dora"]
        assert "required: linear layers" in told["wte"]
        assert "peft's IA3Model" in told["ia3"]
        assert "make the model parallel first" in told["first"]
        assert "is_main_process" in told["main"]
        assert "not finite" in told["merging"]


def as_transformers_adapts(parallel: bool) -> Tensors:
    """Outputs and adapters by `model.add_adapter`, Transformers' own way to peft."""
    model = build("gpt2", "GPT2LMHeadModel", parallel=parallel)
    torch.manual_seed(5)
    model.add_adapter(lora("gpt2", init_lora_weights=False))
    batch = inputs("GPT2LMHeadModel", labels=True)
    loss = model.train()(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | detached(gradients_of(model), "gradient")


def test_adapters_that_transformers_adds(ranks):
    """`model.add_adapter` makes the same parallel pairs."""
    results = ranks(2).run(as_transformers_adapts, True)
    require_equal_ranks(results)
    require_close(results[0], as_transformers_adapts(False), BEHIND_FLOAT32)
