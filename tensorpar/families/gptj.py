"""GPT-J: attention and MLP read the same norm and run side by side, so one all-reduce serves both.

Each returns its partial sum; the residual dropouts inside them draw a common mask and are linear,
so they may come before the sum, on the whole sequence where it is split. Forward:
`reduce(attention + mlp) + residual`; backward: the copy region after the norm sums both branches'
gradients at once.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.nn.fused import FusedAttention
from tensorpar.registry import Stream, register
from tensorpar.rows import Splitting, enter_region, leave_region
from tensorpar.styles import Column, Row, VocabParallel

NAME = "gptj"
MODULE = "transformers.models.gptj.modeling_gptj"


class ParallelBranches:
    """Forward of a block whose attention and MLP are both partial sums of its one output."""

    mesh: DeviceMesh
    ln_1: nn.Module
    attn: nn.Module
    mlp: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_past: Any = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `GPTJBlock.forward`, with one all-reduce."""
        normed = enter_region(self.ln_1(hidden_states), self.mesh)
        with Splitting(None):
            attended, weights = self.attn(
                hidden_states=normed,
                layer_past=layer_past,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
            terms = attended + self.mlp(normed)
        return leave_region(terms, self.mesh) + hidden_states, weights


register(f"{MODULE}.GPTJAttention", fused=FusedAttention)
HEADS = "attn.num_attention_heads"
register(
    f"{MODULE}.GPTJBlock",
    attn__q_proj=Column(heads=HEADS),
    attn__k_proj=Column(heads=HEADS),
    attn__v_proj=Column(heads=HEADS),
    attn__out_proj=Row(heads=HEADS, partial=True),
    mlp__fc_in=Column(),
    mlp__fc_out=Row(partial=True),
    divide=(HEADS,),
    mixin=ParallelBranches,
    at={"h.*": {}},
)
register(f"{MODULE}.GPTJModel", wte=VocabParallel(), stream=Stream("h", "ln_f"), at={"": {}})
register(f"{MODULE}.GPTJForCausalLM", lm_head=VocabParallel(), at={"": {}})
