"""The functions every family has under its own names, made from its table.

Scripts import them by these names; what they do is `translate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .layouts import num_heads
from .table import Table
from .translate import (
    StateDicts,
    translate_from_hf,
    translate_hf_to_smdistributed,
    translate_to_hf,
)

Translator = Callable[..., dict[str, Any]]


def to_hf_function(table: Table, module: str, name: str) -> Translator:
    """`name(state_dict, max_seq_len=None)`: tensorpar's or smdistributed's layout to HF's."""

    def translate(
        state_dict: StateDicts, max_seq_len: int | None = None, *, strict: bool = True
    ) -> dict[str, Any]:
        """Translate tensorpar's or smdistributed's layout, told apart by keys, to Hugging Face's.

        Args:
            state_dict: full tensors, or a list of one dict per tensor-parallel rank.
            max_seq_len: also add the causal-mask buffers of old Transformers versions, this long.
            strict: False lets keys pass through that nobody knows.

        Returns:
            A new dict; its tensors are views of the given ones where a view is enough.

        Raises:
            ValueError: all keys that are missing, unknown or of the wrong shape.
        """
        return translate_to_hf(table, state_dict, max_seq_len, strict=strict)

    return _named(translate, module, name)


def to_smdistributed_function(table: Table, module: str, name: str) -> Translator:
    """`name(state_dict, max_seq_len=None)`: Hugging Face's layout to smdistributed's."""

    def translate(
        state_dict: Mapping[str, Any],
        max_seq_len: int | None = None,  # noqa: ARG001
        *,
        strict: bool = True,
    ) -> dict[str, Any]:
        """Translate Hugging Face's layout to smdistributed's.

        Args:
            state_dict: full tensors; keys may lack the base model's prefix.
            max_seq_len: ignored; scripts pass it.
            strict: False lets keys pass through that nobody knows.

        Returns:
            A new dict without old causal-mask buffers; its tensors are views of the given ones.

        Raises:
            ValueError: all keys that are missing, unknown or of the wrong shape.
        """
        return translate_hf_to_smdistributed(table, state_dict, strict=strict)

    return _named(translate, module, name)


def to_tensorpar_function(table: Table, module: str, name: str) -> Translator:
    """`name(state_dict, config)`: Hugging Face's layout to tensorpar's."""

    def translate(state_dict: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Translate Hugging Face's layout to tensorpar's.

        Args:
            state_dict: full tensors; keys may lack the base model's prefix.
            config: a Transformers config, or a mapping, that tells the number of heads.

        Returns:
            A new dict without old causal-mask buffers; its tensors are views of the given ones.

        Raises:
            ValueError: all keys of the wrong shape; a config without a number of heads.
        """
        return translate_from_hf(table, state_dict, num_heads(config))

    return _named(translate, module, name)


def _named(function: Translator, module: str, name: str) -> Translator:
    """The function as if it had been defined in `module`, so that it pickles and reads well."""
    function.__module__, function.__name__, function.__qualname__ = module, name, name
    return function
