"""GPT-J: the table of smdistributed's layout, and the functions under the names scripts use.

Axes as in GPT-2's table. Both sides keep weights `[out, in]`; the norm that attention and MLP share
is the layer's own, and the head is not tied.
"""

from .functions import to_hf_function, to_smdistributed_function, to_tensorpar_function
from .masks import Masks
from .table import Table, pair, rule

_HF = "transformer.h.{i}"
_SMD = "transformer.seq_layers.{i}"
_NORM = ("h -> h", "h -> h")

_RULES = (
    rule("transformer.wte.weight", "word_embedding.weight", "v h -> v h"),
    *pair(f"{_HF}.ln_1", f"{_SMD}.pre_layernorm", *_NORM),
    rule(f"{_HF}.attn.q_proj.weight", f"{_SMD}.attention.query.weight", "a h -> a h"),
    rule(f"{_HF}.attn.k_proj.weight", f"{_SMD}.attention.key.weight", "a h -> a h"),
    rule(f"{_HF}.attn.v_proj.weight", f"{_SMD}.attention.value.weight", "a h -> a h"),
    rule(f"{_HF}.attn.out_proj.weight", f"{_SMD}.attention.dense.weight", "h a -> h a"),
    *pair(f"{_HF}.mlp.fc_in", f"{_SMD}.output.dense1", "f h -> f h", "f -> f"),
    *pair(f"{_HF}.mlp.fc_out", f"{_SMD}.output.dense2", "h f -> h f", "h -> h", row=True),
    *pair("transformer.ln_f", "layernorm", *_NORM),
)

TABLE = Table(
    family="gptj",
    rules=_RULES,
    extras=(pair("lm_head", "lm_head", "v h -> v h", "v -> v"),),
    smd_trunk=("transformer.", "word_embedding.", "layernorm."),
    masks=Masks(places=("h.*.attn",), masked_bias=-1e9),
)
"""All that is known of GPT-J beside the registered plans."""

translate_state_dict_to_hf_gptj = to_hf_function(TABLE, __name__, "translate_state_dict_to_hf_gptj")
translate_hf_state_dict_to_smdistributed_gptj = to_smdistributed_function(
    TABLE, __name__, "translate_hf_state_dict_to_smdistributed_gptj"
)
translate_hf_state_dict_to_tensorpar_gptj = to_tensorpar_function(
    TABLE, __name__, "translate_hf_state_dict_to_tensorpar_gptj"
)

# other names that scripts use
translate_hf_gptj_state_dict_to_smdistributed_gptj = translate_hf_state_dict_to_smdistributed_gptj
translate_hf_gptj_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gptj
translate_hf_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gptj
translate_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gptj
