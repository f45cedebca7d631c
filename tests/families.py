"""The model families, once: tests that hold for every family are parametrised over this list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class FamilyCase:
    """One family.

    Attributes:
        name: for test ids; also the module in `tensorpar.translators`.
        model_type: Transformers' name.
        config: makes a tiny config from sizes that have the same names for all families; the
            defaults divide by no world size.
        model: the class of the model with a language modelling head.
        variants: arguments of Transformers' config under which the model has other parameters.
    """

    name: str
    model_type: str
    config: Callable[..., Any]
    model: str
    variants: tuple[Mapping[str, Any], ...] = ({},)

    def state_dict(self, config: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """A model's state dict with random values everywhere, tied where the model ties."""
        model = getattr(transformers, self.model)(config)
        random = torch.Generator().manual_seed(0)
        values = {
            parameter.data_ptr(): torch.randn(parameter.shape, generator=random).to(dtype)
            for parameter in model.parameters()
        }
        return {name: values[tensor.data_ptr()] for name, tensor in model.state_dict().items()}


def gpt2_config(
    *,
    layers: int = 2,
    heads: int = 5,
    head_size: int = 8,
    inner: int = 83,
    vocab: int = 97,
    positions: int = 16,
    **changes: Any,
) -> transformers.GPT2Config:
    """A tiny GPT-2."""
    return transformers.GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=heads * head_size,
        n_inner=inner,
        vocab_size=vocab,
        n_positions=positions,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )


FAMILIES = (
    FamilyCase(
        "gpt2",
        "gpt2",
        gpt2_config,
        "GPT2LMHeadModel",
        ({}, {"add_cross_attention": True}),
    ),
)
