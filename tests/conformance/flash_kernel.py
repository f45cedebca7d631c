"""A stand-in for the flash attention kernel, which needs a GPU and a package of its own.

Everything of Transformers' around it is real: how a mask is passed on, how padding is left out and
put back, and which heads there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import modeling_flash_attention_utils as flash
from transformers.models.gpt_neo import modeling_gpt_neo
from transformers.models.gptj import modeling_gptj


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
) -> torch.Tensor:
    """`[tokens, heads, size]` of one sequence; the last query is where the last key is."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    behind = torch.arange(query.shape[1])[:, None] + key.shape[1] - query.shape[1]
    distance = behind - torch.arange(key.shape[1])
    left, right = window[0], 0 if causal else window[1]
    hidden = (distance > left) & (left >= 0) | (-distance > right) & (right >= 0)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value).transpose(0, 1)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """`[batch, tokens, heads, size]`, as the package's function of this name."""
    assert not dropout_p
    rows = zip(q, k, v, strict=True)
    return torch.stack([dense(*row, softmax_scale, causal, window_size) for row in rows])


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """`[tokens of all sequences, heads, size]`, as the package's function of this name."""
    assert not dropout_p
    assert max_seqlen_q <= len(q)
    assert max_seqlen_k <= len(k)
    queries = q.tensor_split(cu_seqlens_q[1:-1].tolist())
    keys, values = (x.tensor_split(cu_seqlens_k[1:-1].tolist()) for x in (k, v))
    rows = zip(queries, keys, values, strict=True)
    return torch.cat([dense(*row, softmax_scale, causal, window_size) for row in rows])


@contextmanager
def installed() -> Iterator[set[int]]:
    """Within: Transformers finds the kernel; yields the numbers of heads it is then called with."""
    heads: set[int] = set()

    def noting(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(kernel)
        def noted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            heads.add(query.shape[-2])
            return kernel(query, *args, **kwargs)

        return noted

    def found(*_: Any, **__: Any) -> tuple[Any, ...]:
        pad, unpad = flash._pad_input, flash._unpad_input
        return noting(flash_attn_func), noting(flash_attn_varlen_func), None, pad, unpad

    with ExitStack() as stack:
        for owner, name, value in (
            (flash, "_lazy_imports", found),
            (flash, "_loaded_implementation", None),
            (transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        for module in (modeling_gpt_neo, modeling_gptj):  # which look for the package when imported
            patch = mock.patch.object(
                module, "_flash_attention_forward", flash._flash_attention_forward, create=True
            )
            stack.enter_context(patch)
        yield heads
