"""GPT-2: the table of smdistributed's layout, and the functions under the names scripts use.

Axes: `v` vocabulary, `p` positions, `h` hidden, `a` = heads x head size, `f` intermediate, `b` the
fused projections. Hugging Face keeps weights `[in, out]`, smdistributed `[out, in]`.
"""

from .functions import to_hf_function, to_smdistributed_function, to_tensorpar_function
from .masks import Masks
from .table import Table, pair, rule

_HF = "transformer.h.{i}"
_SMD = "transformer.seq_layers.{i}"
_NORM = ("h -> h", "h -> h")

_SELF_ATTENTION = tuple(f"{_SMD}.attention.{name}" for name in ("query", "key", "value"))
_RULES = (
    rule("transformer.wte.weight", "word_embedding.weight", "v h -> v h"),
    rule("transformer.wpe.weight", "position_embedding.weight", "p h -> p h"),
    *pair(f"{_HF}.ln_1", f"{_SMD}.attention.pre_layernorm", *_NORM),
    *pair(f"{_HF}.attn.c_attn", _SELF_ATTENTION, "h (b a) -> b a h", "(b a) -> b a"),
    *pair(f"{_HF}.attn.c_proj", f"{_SMD}.attention.dense", "a h -> h a", "h -> h", row=True),
    *pair(f"{_HF}.ln_2", f"{_SMD}.output.pre_layernorm", *_NORM),
    *pair(f"{_HF}.mlp.c_fc", f"{_SMD}.output.dense1", "h f -> f h", "f -> f"),
    *pair(f"{_HF}.mlp.c_proj", f"{_SMD}.output.dense2", "f h -> h f", "h -> h", row=True),
    *pair("transformer.ln_f", "transformer.seq_layers.{last}.output.layernorm", *_NORM),
)

_HF_CROSS = f"{_HF}.crossattention"
_SMD_CROSS = f"{_SMD}.cross_attention"
_KEY_VALUE = (f"{_SMD_CROSS}.key", f"{_SMD_CROSS}.value")
_CROSS_ATTENTION = (
    *pair(f"{_HF}.ln_cross_attn", f"{_SMD_CROSS}.pre_layernorm", *_NORM),
    *pair(f"{_HF_CROSS}.q_attn", f"{_SMD_CROSS}.query", "h a -> a h", "a -> a"),
    *pair(f"{_HF_CROSS}.c_attn", _KEY_VALUE, "h (b a) -> b a h", "(b a) -> b a"),
    *pair(f"{_HF_CROSS}.c_proj", f"{_SMD_CROSS}.dense", "a h -> h a", "h -> h", row=True),
)

TABLE = Table(
    family="gpt2",
    rules=_RULES,
    extras=(_CROSS_ATTENTION, (rule("lm_head.weight", "lm_head.weight", "v h -> v h"),)),
    tied={
        "hf": ("transformer.wte.weight", "lm_head.weight"),
        "smd": ("word_embedding.weight", "lm_head.weight"),
    },
    masks=Masks(places=("h.*.attn", "h.*.crossattention"), masked_bias=-1e4),
)
"""All that is known of GPT-2 beside the registered plans."""

translate_state_dict_to_hf_gpt2 = to_hf_function(TABLE, __name__, "translate_state_dict_to_hf_gpt2")
translate_hf_state_dict_to_smdistributed_gpt2 = to_smdistributed_function(
    TABLE, __name__, "translate_hf_state_dict_to_smdistributed_gpt2"
)
translate_hf_state_dict_to_tensorpar_gpt2 = to_tensorpar_function(
    TABLE, __name__, "translate_hf_state_dict_to_tensorpar_gpt2"
)

# other names that scripts use
translate_hf_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gpt2
translate_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gpt2

# models of which only the layers were distributed; the way back is told by the keys
translate_hf_state_dict_to_smdistributed_gpt2_layer = to_smdistributed_function(
    TABLE.layers_only(), __name__, "translate_hf_state_dict_to_smdistributed_gpt2_layer"
)
translate_state_dict_to_hf_gpt2_layer = translate_state_dict_to_hf_gpt2
