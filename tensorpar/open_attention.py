"""Scaled dot-product attention in plain products, for dropout that no fused kernel would draw."""

from __future__ import annotations

from collections.abc import Callable

import torch


def attention_in_the_open(  # noqa: PLR0913  (torch's own arguments)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    drop: Callable[[torch.Tensor], torch.Tensor],
    is_causal: bool,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `F.scaled_dot_product_attention` computes on the CPU, with `drop` for its dropout.

    Like it, half precisions are computed in float32, and a query that may see no key gets zeros.

    Args:
        query: `[..., heads, queries, head size]`.
        key: `[..., key heads, keys, head size]`.
        value: `[..., key heads, keys, value size]`.
        attn_mask: bool (True: attend) or additive, broadcastable to `[..., heads, queries, keys]`.
        drop: maps attention weights to those that are kept, scaled.
        is_causal: a query attends to keys at its place and before.
        scale: of the scores; by default one over the root of the head size.
        enable_gqa: heads share key heads.
    """
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        group = query.shape[-3] // max(key.shape[-3], 1)  # a rank may have neither
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return (drop(weights) @ value).to(dtype)
