"""GPT-NeoX: q, k and v interleaved within each head."""

from tensorpar.registry import Stream, register
from tensorpar.styles import Column, Row, VocabParallel

NAME = "gpt_neox"
MODULE = "transformers.models.gpt_neox.modeling_gpt_neox"

HEADS = "config.num_attention_heads"
register(
    f"{MODULE}.GPTNeoXAttention",
    query_key_value=Column(blocks=3, heads=HEADS, interleaved=True),
    dense=Row(heads=HEADS),
    enter=("hidden_states",),
    at={"layers.*.attention": {}},
)
register(
    f"{MODULE}.GPTNeoXMLP",
    dense_h_to_4h=Column(),
    dense_4h_to_h=Row(),
    enter=("hidden_states",),
    at={"layers.*.mlp": {}},
)
register(
    f"{MODULE}.GPTNeoXModel",
    embed_in=VocabParallel(),
    stream=Stream("layers", "final_layer_norm"),
    at={"": {}},
)
register(f"{MODULE}.GPTNeoXForCausalLM", lm_head=VocabParallel(formerly="embed_out"), at={"": {}})
