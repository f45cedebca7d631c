"""Tiny configs of every family, from sizes that have the same names for all.

The defaults divide by no world size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import transformers

SIZES = {"layers": 2, "heads": 5, "head_size": 8, "inner": 83, "vocab": 97, "positions": 16}
#: what a config calls the number of layers, of heads, the width, the inner width and the positions.
BERT_NAMES = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
)
GPT_NAMES = ("n_layer", "n_head", "n_embd", "n_inner", "n_positions")
NEO_NAMES = ("num_layers", "num_heads", *BERT_NAMES[2:])


def tiny(
    config: Callable[..., Any],
    names: tuple[str, ...],
    extra: Callable[[Mapping[str, int]], Mapping[str, Any]] = lambda _: {},
    **changes: Any,
) -> Any:
    """A config of a class, by common sizes; anything else passes through and wins.

    Args:
        config: Transformers' class.
        names: what it calls the sizes.
        extra: arguments of its own, made from the sizes.
        changes: any of `SIZES`, and arguments of the class.
    """
    sizes = {name: changes.pop(name, size) for name, size in SIZES.items()}
    width = sizes["heads"] * sizes["head_size"]
    own = (sizes["layers"], sizes["heads"], width, sizes["inner"], sizes["positions"])
    given = {"vocab_size": sizes["vocab"], "bos_token_id": 0, "eos_token_id": 0}
    return config(**{**given, **dict(zip(names, own, strict=True)), **extra(sizes), **changes})


def _padded(_: Mapping[str, int]) -> Mapping[str, Any]:
    return {"pad_token_id": 0}


def _half_of_each_head_rotates(sizes: Mapping[str, int]) -> Mapping[str, Any]:
    return {"rotary_dim": sizes["head_size"] // 4 * 2}


def _every_second_layer_is_local(sizes: Mapping[str, int]) -> Mapping[str, Any]:
    layers = sizes["layers"]
    types = [[["global", "local"], layers // 2], [["global"], layers % 2]]
    return {"attention_types": types, "window_size": 3}


gpt2_config = partial(tiny, transformers.GPT2Config, GPT_NAMES)
bert_config = partial(tiny, transformers.BertConfig, BERT_NAMES, _padded)
roberta_config = partial(tiny, transformers.RobertaConfig, BERT_NAMES, _padded)
gptj_config = partial(tiny, transformers.GPTJConfig, GPT_NAMES, _half_of_each_head_rotates)
gptneo_config = partial(tiny, transformers.GPTNeoConfig, NEO_NAMES, _every_second_layer_is_local)
gptneox_config = partial(tiny, transformers.GPTNeoXConfig, BERT_NAMES)
