"""Decoders that attend to an encoder, and `EncoderDecoderModel`, which is made of two models."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EncoderDecoderConfig, EncoderDecoderModel

import tensorpar
from tests.conformance.families import (
    CASES,
    CAUSAL,
    EXACT,
    build,
    compared,
    generated,
    inputs,
    perturb,
    tiny_config,
)
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    gradients_of,
    require_close,
    require_equal_ranks,
    tensors_of,
    weights_of,
)

DECODER = {"is_decoder": True, "add_cross_attention": True}
SEEN = {"output_attentions": True, "output_hidden_states": True}
EAGER = {"attn_implementation": "eager"}
#: a decoder's family to its encoder's.
ENCODERS = {"bert": "bert", "gpt2": "bert", "roberta": "roberta"}
#: GPT-2 decoders have other sizes than their encoder, and a projection between them.
SIZES = {"gpt2": {"heads": 3, "head_size": 8, "inner": 50, "vocab": 89}}


def cross_attending(family: str, attention: str, parallel: bool) -> Tensors:
    """Outputs and gradients of a causal model given an encoder's states, with padding."""
    config = {**DECODER, "attn_implementation": attention}
    model = build(family, CAUSAL[family], parallel=parallel, config=config)
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(3, 6, 40, generator=generator, dtype=torch.float64)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    given = {
        **inputs("", labels=False),
        "encoder_hidden_states": states.requires_grad_(),
        "encoder_attention_mask": mask,
        **(SEEN if attention == "eager" else {}),
    }
    found = compared(model, given, given["attention_mask"])
    assert ("output/cross_attentions.1" in found) == (attention == "eager")
    return found


@pytest.mark.feature("is_decoder, add_cross_attention")
@pytest.mark.parametrize(("size", "attention"), [(2, "sdpa"), (4, "eager")])
@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_cross_attention(ranks, family, size, attention):
    """Outputs, all heads of cross-attentions, gradients; the encoder states' gradient is whole."""
    results = ranks(size).run(cross_attending, family, attention, True)
    require_equal_ranks(results)
    require_close(results[0], cross_attending(family, attention, False), EXACT)


def pair_config(family: str, attention: str) -> EncoderDecoderConfig:
    """An encoder and a decoder, neither of whose head counts divides."""
    encoder = tiny_config(ENCODERS[family])
    decoder = tiny_config(family, **DECODER, **SIZES.get(family, {}))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config._attn_implementation = attention
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    config.eos_token_id = 0
    return config


def pair(family: str, *, parallel: bool, attention: str = "sdpa") -> Any:
    """The model, built in the context if parallel, then with every parameter perturbed."""

    def fresh(within: Any) -> Any:
        torch.manual_seed(0)
        with default_dtype(torch.float64), within:
            return EncoderDecoderModel(config=pair_config(family, attention))

    reference = fresh(nullcontext())
    if not parallel:
        perturb(reference)
        return reference
    model = fresh(tensorpar.tensor_parallelism())
    same = weights_of(reference)
    assert all(torch.equal(x, same[name]) for name, x in weights_of(model).items())
    perturb(reference)
    tensorpar.DistributedModel(model).load_state_dict(reference.state_dict())
    return model


def source() -> dict[str, torch.Tensor]:
    """What the encoder reads, with right padding."""
    return inputs("", labels=False)


def target() -> dict[str, torch.Tensor]:
    """What the decoder reads."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 89, (3, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 3:] = 0
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def translated(family: str, attention: str, parallel: bool) -> Tensors:
    """All outputs, then the loss and all gradients of a step with labels."""
    model = pair(family, parallel=parallel, attention=attention)
    seen = SEEN if attention == "eager" else {"output_hidden_states": True}
    with torch.no_grad():
        output = tensors_of(model.eval()(**source(), **target(), **seen))
    found = detached(output, "output")
    assert ("output/cross_attentions.1" in found) == (attention == "eager")
    labels = target()["decoder_input_ids"].masked_fill(
        target()["decoder_attention_mask"] == 0, -100
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the loss is newer than v4.12's
        output = model.train()(**source(), labels=labels)
    output.loss.backward()
    found |= detached({"loss": output.loss, "logits": tensors_of(output)["logits"]}, "train")
    return found | detached(gradients_of(model), "gradient")


@pytest.mark.feature("EncoderDecoderModel")
@pytest.mark.parametrize(("size", "attention"), [(2, "sdpa"), (4, "eager")])
@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_encoder_decoder(ranks, family, size, attention):
    """The same initial values, outputs, attentions of three kinds, loss and every gradient."""
    results = ranks(size).run(translated, family, attention, True)
    require_equal_ranks(results)
    require_close(results[0], translated(family, attention, False), EXACT)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


def continued(family: str, parallel: bool) -> Tensors:
    """Tokens and logits of each way of generating, from a padded source."""
    model = pair(family, parallel=parallel).eval()
    found: Tensors = {}
    for name, way in WAYS.items():
        torch.manual_seed(3 + (torch.distributed.get_rank() if parallel else 0))
        done = generated(model, source(), max_new_tokens=8, **way)
        found |= {f"{name}/{key}": x for key, x in done.items()}
    return found


@pytest.mark.feature("EncoderDecoderModel: generation")
@pytest.mark.parametrize(("family", "size"), [("bert", 4), ("gpt2", 2), ("roberta", 2)])
def test_generation_from_a_source(ranks, family, size):
    """Greedy, beams, sampling and a static cache: one process's tokens, on every rank."""
    results = ranks(size).run(continued, family, True)
    require_equal_ranks(results)
    reference = continued(family, False)
    require_close(results[0], reference, 1e-5)  # `generate` keeps logits in float32
    ids = source()["input_ids"]
    unmasked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lost = generated(pair(family, parallel=False).eval(), unmasked, max_new_tokens=1)["logits"]
    assert (lost[0, 1] - reference["greedy/logits"][0, 1]).abs().max() > 1e-3


def assembled(family: str, folder: Path, saved: Path, parallel: bool) -> Tensors:
    """A model made of two folders, saved as one; its weights."""
    torch.manual_seed(0)
    with tensorpar.tensor_parallelism() if parallel else nullcontext():
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(
            folder / "encoder",
            folder / "decoder",
            encoder_dtype=torch.float64,
            decoder_dtype=torch.float64,
        )
    model.save_pretrained(saved)
    return weights_of(model)


@pytest.mark.feature("EncoderDecoderModel: from two folders, saved as one")
@pytest.mark.parametrize("has_cross_attention", [True, False])
@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_from_two_folders(ranks, tmp_path, family, has_cross_attention):
    """Checkpoints of two models make one; what they lack is drawn as in one process."""
    config = DECODER if has_cross_attention else {}
    decoder = {**config, **SIZES.get(family, {})}
    encoder_class = CASES[ENCODERS[family]].heads[0]
    build(ENCODERS[family], encoder_class, parallel=False).save_pretrained(tmp_path / "encoder")
    model = build(family, CAUSAL[family], parallel=False, config=decoder)
    model.save_pretrained(tmp_path / "decoder")
    reference = assembled(family, tmp_path, tmp_path / "alone", False)
    results = ranks(2).run(assembled, family, tmp_path, tmp_path / "together", True)
    require_equal_ranks(results)
    require_close(results[0], reference, 0.0)
    reloaded = EncoderDecoderModel.from_pretrained(tmp_path / "together", dtype=torch.float64)
    require_close(weights_of(reloaded), reference, 0.0)
