"""GPT-2: every class of Hugging Face's model that holds sharded children."""

from tensorpar.registry import Stream, register
from tensorpar.styles import Column, Row, VocabParallel

NAME = "gpt2"
MODULE = "transformers.models.gpt2.modeling_gpt2"

register(
    f"{MODULE}.GPT2Attention",
    # cross-attention fuses k|v only and keeps q apart
    c_attn=Column(
        blocks=lambda attention: 2 if attention.is_cross_attention else 3,
        heads="num_heads",
        stored="io",
    ),
    q_attn=Column(heads="num_heads", stored="io", optional=True),
    c_proj=Row(heads="num_heads", stored="io"),
    divide=("num_heads", "split_size"),
    enter=("hidden_states", "encoder_hidden_states"),
    at={
        "h.*.attn": {"is_cross_attention": False},
        "h.*.crossattention": {"is_cross_attention": True},
    },
)
register(
    f"{MODULE}.GPT2MLP",
    c_fc=Column(stored="io"),
    c_proj=Row(stored="io"),
    enter=("hidden_states",),
    at={"h.*.mlp": {}},
)
register(f"{MODULE}.GPT2Model", wte=VocabParallel(), stream=Stream("h", "ln_f"), at={"": {}})
for head in ("GPT2LMHeadModel", "GPT2DoubleHeadsModel"):
    register(f"{MODULE}.{head}", lm_head=VocabParallel(), at={"": {}})
