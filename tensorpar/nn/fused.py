"""Fused attention for models whose Transformers class computes its scores in the open.

Only the maths between the projections changes: `scaled_dot_product_attention` in place of two
products around a softmax, so that no `[batch, heads, queries, keys]` scores are ever allocated.
When a forward records attention weights, which a fused kernel does not have, or dropout must be
reproducible, the model's own maths runs; so it does after `model.set_attn_implementation("eager")`.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_dynamo_compiling

from tensorpar.reproducible import reproducing

_recording: ContextVar[bool] = ContextVar("recording_attentions", default=False)


class FusedAttention:
    """Mixed into an attention class with Transformers' older `_attn` method.

    Attributes:
        head_dim: size of a head.
        attn_dropout: the dropout on attention weights.
        is_scaled: whether scores are divided by the root of the head size.
        is_fused: whether the kernel is used at all, or the model's own maths.
    """

    head_dim: int
    attn_dropout: nn.Dropout
    training: bool
    is_scaled = True
    is_fused = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward, which fuses nothing where attention weights are wanted.

        The argument tells, not what holds during the model's forward: that is over when a
        checkpointed layer is recomputed.
        """
        token = _recording.set(bool(kwargs.get("output_attentions")))
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _recording.reset(token)

    def _attn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All `[batch, heads, sequence, head_dim]`; no weights are returned.

        The mask is additive, or boolean with True for what is seen.
        """
        if not self.is_fused:
            return super()._attn(query, key, value, attention_mask)  # type: ignore[misc]
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            lowest = torch.finfo(torch.float32).min
            nothing = torch.zeros_like(attention_mask, dtype=torch.float32)
            attention_mask = nothing.masked_fill(~attention_mask, lowest)
        mask, hides_a_query = self._prepared(attention_mask, query.shape[-2], key.shape[-2])
        if _recording.get() or hides_a_query or reproducing():
            return super()._attn(query, key, value, attention_mask)  # type: ignore[misc]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value.to(query.dtype),
            attn_mask=mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            scale=self.head_dim**-0.5 if self.is_scaled else 1.0,
        )
        return output.to(value.dtype), None

    def _prepared(
        self, attention_mask: torch.Tensor | None, num_queries: int, num_keys: int
    ) -> tuple[torch.Tensor | None, bool]:
        """The kernel's mask, and whether it hides every key from some query.

        Such queries are padding; the kernels' backward is wrong for them, and the model's own
        maths is not. Worked out once per forward: layers of a kind share the model's mask.
        """
        if attention_mask is None:
            return self.combined_mask(None, num_queries, num_keys), False
        # a graph cannot keep it beside the mask; one of inference does not tell when it was changed
        if is_dynamo_compiling() or attention_mask.is_inference():
            return self._prepare(attention_mask, num_queries, num_keys)
        cache = attention_mask.__dict__.setdefault("_tensorpar_prepared", {})
        version, prepared = cache.get(self.mask_kind, (None, None))
        if version != attention_mask._version:
            prepared = self._prepare(attention_mask, num_queries, num_keys)
            cache[self.mask_kind] = attention_mask._version, prepared
        return prepared

    def _prepare(
        self, attention_mask: torch.Tensor, num_queries: int, num_keys: int
    ) -> tuple[torch.Tensor | None, bool]:
        mask = self.combined_mask(attention_mask, num_queries, num_keys)
        lowest = torch.finfo(attention_mask.dtype).min
        return mask, mask is not None and bool((mask.amax(-1) <= lowest).any())

    @property
    def mask_kind(self) -> str:
        """Layers with the same kind get the same mask from `combined_mask`."""
        return ""

    def combined_mask(
        self, attention_mask: torch.Tensor | None, num_queries: int, num_keys: int
    ) -> torch.Tensor | None:
        """The mask of the kernel; here that which the model made, causal and padding in one."""
        del num_queries, num_keys
        return attention_mask
