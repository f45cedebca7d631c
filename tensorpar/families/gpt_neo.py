"""GPT-Neo: global and local attention share one class of projections."""

import torch

from tensorpar.nn.fused import FusedAttention
from tensorpar.registry import Stream, register
from tensorpar.styles import Column, Row, VocabParallel

NAME = "gpt_neo"
MODULE = "transformers.models.gpt_neo.modeling_gpt_neo"


class FusedWindowedAttention(FusedAttention):
    """Unscaled scores, and a causal mask of the layer's own: whole, or a band of local keys."""

    bias: torch.Tensor
    attention_type: str
    is_scaled = False

    @property
    def mask_kind(self) -> str:
        """Global and local layers."""
        return self.attention_type

    def combined_mask(
        self, attention_mask: torch.Tensor | None, num_queries: int, num_keys: int
    ) -> torch.Tensor:
        """The band, on top of the model's mask."""
        band = self.bias[:, :, num_keys - num_queries : num_keys, :num_keys]
        if attention_mask is None:
            return band
        return attention_mask.masked_fill(~band, torch.finfo(attention_mask.dtype).min)


register(
    f"{MODULE}.GPTNeoSelfAttention",
    fused=FusedWindowedAttention,
    q_proj=Column(heads="num_heads"),
    k_proj=Column(heads="num_heads"),
    v_proj=Column(heads="num_heads"),
    out_proj=Row(heads="num_heads"),
    divide=("num_heads",),
    enter=("hidden_states",),
    at={"h.*.attn.attention": {}},
)
register(
    f"{MODULE}.GPTNeoMLP",
    c_fc=Column(),
    c_proj=Row(),
    enter=("hidden_states",),
    at={"h.*.mlp": {}},
)
register(f"{MODULE}.GPTNeoModel", wte=VocabParallel(), stream=Stream("h", "ln_f"), at={"": {}})
register(f"{MODULE}.GPTNeoForCausalLM", lm_head=VocabParallel(), at={"": {}})
