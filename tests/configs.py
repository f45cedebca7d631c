"""Tiny configs of every family, from sizes that have the same names for all.

The defaults divide by no world size.
"""

from __future__ import annotations

from typing import Any

import transformers


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


def bert_config(
    *,
    layers: int = 2,
    heads: int = 5,
    head_size: int = 8,
    inner: int = 83,
    vocab: int = 97,
    positions: int = 16,
    config: Any = transformers.BertConfig,
    **changes: Any,
) -> Any:
    """A tiny BERT, or by its class another config with the same names."""
    return config(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=heads * head_size,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **changes,
    )


def gptj_config(
    *,
    layers: int = 2,
    heads: int = 5,
    head_size: int = 8,
    inner: int = 83,
    vocab: int = 97,
    positions: int = 16,
    **changes: Any,
) -> transformers.GPTJConfig:
    """A tiny GPT-J; half of each head rotates."""
    return transformers.GPTJConfig(
        n_layer=layers,
        n_head=heads,
        n_embd=heads * head_size,
        n_inner=inner,
        vocab_size=vocab,
        n_positions=positions,
        rotary_dim=head_size // 4 * 2,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )


def gptneo_config(
    *,
    layers: int = 2,
    heads: int = 5,
    head_size: int = 8,
    inner: int = 83,
    vocab: int = 97,
    positions: int = 16,
    **changes: Any,
) -> transformers.GPTNeoConfig:
    """A tiny GPT-Neo, every second layer local."""
    types = [[["global", "local"], layers // 2], [["global"], layers % 2]]
    return transformers.GPTNeoConfig(
        num_layers=layers,
        num_heads=heads,
        hidden_size=heads * head_size,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        **{"attention_types": types, "window_size": 3, **changes},
    )


def gptneox_config(
    *,
    layers: int = 2,
    heads: int = 5,
    head_size: int = 8,
    inner: int = 83,
    vocab: int = 97,
    positions: int = 16,
    **changes: Any,
) -> transformers.GPTNeoXConfig:
    """A tiny GPT-NeoX."""
    return transformers.GPTNeoXConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=heads * head_size,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
