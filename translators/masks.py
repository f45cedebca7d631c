"""The causal-mask buffers that old Transformers versions kept in their state dicts.

Current versions keep none: reading drops them on purpose, writing adds them only where asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .layouts import ends_with
from .tensors import StateDict


@dataclass(frozen=True)
class Masks:
    """Which modules kept masks, and what was in them.

    Attributes:
        places: the ends of the attention modules' paths, `"h.*.attn"`.
        masked_bias: the number put where attention is masked.
        window: the width of a layer's local attention, None for global, by the layer's index and
            the model's config, which may be None.
    """

    places: tuple[str, ...]
    masked_bias: float
    window: Callable[[int, Any], int | None] = lambda _layer, _config: None

    def has(self, key: str) -> bool:
        """Whether `key` names one of these buffers."""
        path, _, name = key.rpartition(".")
        return name in ("bias", "masked_bias") and self._holds(path)

    def made_for(self, keys: Iterable[str], max_seq_len: int, config: Any = None) -> StateDict:
        """New buffers for every attention module of a state dict in Hugging Face's layout.

        Args:
            keys: the state dict's.
            max_seq_len: M; masks are uint8 `[1, 1, M, M]`.
            config: the model's, if known.

        Raises:
            ValueError: `max_seq_len` is not a positive integer.
        """
        size = _positive(max_seq_len)
        buffers: StateDict = {}
        for path in dict.fromkeys(self._paths(keys)):
            layer = next(int(part) for part in path.split(".") if part.isdigit())
            buffers[f"{path}.bias"] = causal_mask(size, self.window(layer, config))
            buffers[f"{path}.masked_bias"] = torch.tensor(self.masked_bias, dtype=torch.float32)
        return buffers

    def _holds(self, path: str) -> bool:
        return any(ends_with(path, place) for place in self.places)

    def _paths(self, keys: Iterable[str]) -> Iterator[str]:
        for key in keys:
            path = key.rpartition(".")[0].rpartition(".")[0]
            if self._holds(path):
                yield path


def causal_mask(size: int, window: int | None = None) -> torch.Tensor:
    """uint8 `[1, 1, size, size]`: row r keeps columns 0..r, or with a window the last of these."""
    mask = torch.ones(size, size, dtype=torch.uint8).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    return mask.reshape(1, 1, size, size)


def _positive(max_seq_len: int) -> int:
    try:
        size = operator.index(max_seq_len)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"max_seq_len = {max_seq_len!r}, required: a positive integer or None")
    return size
