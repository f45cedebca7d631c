"""GPT-Neo: global and local attention share one class of projections."""

from tensorpar.registry import register
from tensorpar.styles import Column, Row, VocabParallel

NAME = "gpt_neo"
MODULE = "transformers.models.gpt_neo.modeling_gpt_neo"

register(
    f"{MODULE}.GPTNeoSelfAttention",
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
register(f"{MODULE}.GPTNeoModel", wte=VocabParallel(), at={"": {}})
register(f"{MODULE}.GPTNeoForCausalLM", lm_head=VocabParallel(), at={"": {}})
