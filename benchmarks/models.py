"""The five families at one shape: what every benchmark trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: family to the config's class, the model's class, and its own names for the shape.
FAMILIES: dict[str, tuple[str, str, dict[str, str]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"width": "n_embd", "layers": "n_layer", "heads": "n_head", "positions": "n_positions"},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {}),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        {"width": "n_embd", "layers": "n_layer", "heads": "n_head", "positions": "n_positions"},
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {"layers": "num_layers", "heads": "num_heads"},
    ),
}
_NAMES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "positions": "max_position_embeddings",
}


@dataclass(frozen=True)
class Shape:
    """A model and the batch that it is fed; heads have 64 features.

    Attributes:
        family: one of `FAMILIES`.
        width: hidden size.
        layers: how many blocks.
        batch: rows.
        sequence: tokens in a row.
        vocabulary: how many tokens there are.
        dropout: everywhere.
    """

    family: str = "gpt2"
    width: int = 768
    layers: int = 4
    batch: int = 4
    sequence: int = 128
    vocabulary: int = 30522
    dropout: float = 0.0

    def config(self) -> Any:
        """Transformers' config."""
        import transformers

        config_class, _, own = FAMILIES[self.family]
        names = {**_NAMES, **own}
        sizes = {
            names["width"]: self.width,
            names["layers"]: self.layers,
            names["heads"]: self.width // 64,
            # RoBERTa's positions begin after the padding token's
            names["positions"]: self.sequence + 2,
            "vocab_size": self.vocabulary,
        }
        if self.family == "gpt_neo":
            pairs, odd = divmod(self.layers, 2)
            sizes["attention_types"] = [[["global", "local"], pairs], [["global"], odd]]
        if self.family in ("bert", "roberta"):
            sizes["intermediate_size"] = 4 * self.width
        config = getattr(transformers, config_class)(**sizes, bos_token_id=0, eos_token_id=0)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, self.dropout)
        return config

    def build(self) -> torch.nn.Module:
        """The model, in training; the same values wherever it is built."""
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, FAMILIES[self.family][1])(self.config())
        return model.train()
