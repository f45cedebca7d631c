"""GPT-Neo: the table of smdistributed's layout, and the functions under the names scripts use.

Axes as in GPT-2's table. Both sides keep weights `[out, in]`.
"""

from typing import Any

from .functions import to_hf_function, to_smdistributed_function, to_tensorpar_function
from .layouts import setting
from .masks import Masks
from .table import Table, pair, rule

_HF = "transformer.h.{i}"
_SMD = "transformer.seq_layers.{i}"
_HF_ATTENTION = f"{_HF}.attn.attention"
_SMD_ATTENTION = f"{_SMD}.attention"
_NORM = ("h -> h", "h -> h")

_RULES = (
    rule("transformer.wte.weight", "word_embedding.weight", "v h -> v h"),
    rule("transformer.wpe.weight", "position_embedding.weight", "p h -> p h"),
    *pair(f"{_HF}.ln_1", f"{_SMD_ATTENTION}.pre_layernorm", *_NORM),
    rule(f"{_HF_ATTENTION}.q_proj.weight", f"{_SMD_ATTENTION}.query.weight", "a h -> a h"),
    rule(f"{_HF_ATTENTION}.k_proj.weight", f"{_SMD_ATTENTION}.key.weight", "a h -> a h"),
    rule(f"{_HF_ATTENTION}.v_proj.weight", f"{_SMD_ATTENTION}.value.weight", "a h -> a h"),
    *pair(f"{_HF_ATTENTION}.out_proj", f"{_SMD_ATTENTION}.dense", "h a -> h a", "h -> h", row=True),
    *pair(f"{_HF}.ln_2", f"{_SMD}.output.pre_layernorm", *_NORM),
    *pair(f"{_HF}.mlp.c_fc", f"{_SMD}.output.dense1", "f h -> f h", "f -> f"),
    *pair(f"{_HF}.mlp.c_proj", f"{_SMD}.output.dense2", "h f -> h f", "h -> h", row=True),
    *pair("transformer.ln_f", "transformer.seq_layers.{last}.output.layernorm", *_NORM),
)


def window(layer: int, config: Any = None) -> int | None:
    """How many tokens a layer attends to; None for all before.

    Without a config as all published models have it: every second layer is local, of width 256.

    Raises:
        ValueError: the config tells of fewer layers.
    """
    kinds = _kinds(config) or ["global", "local"] * (layer // 2 + 1)
    if layer >= len(kinds):
        raise ValueError(
            f"config.attention_layers = {kinds!r}, required: one for each layer, also for {layer}"
        )
    if kinds[layer] != "local":
        return None
    width = None if config is None else setting(config, "window_size")
    return 256 if width is None else int(width)


def _kinds(config: Any) -> list[str] | None:
    """Whether each layer is global or local, as the config tells it in one of two ways."""
    if config is None:
        return None
    repeated = setting(config, "attention_types") or ()
    kinds = [kind for cycle, times in repeated for kind in list(cycle) * times]
    return list(setting(config, "attention_layers") or kinds) or None


TABLE = Table(
    family="gpt_neo",
    rules=_RULES,
    extras=((rule("lm_head.weight", "lm_head.weight", "v h -> v h"),),),
    tied={
        "hf": ("transformer.wte.weight", "lm_head.weight"),
        "smd": ("word_embedding.weight", "lm_head.weight"),
    },
    masks=Masks(places=("h.*.attn.attention",), masked_bias=-1e9, window=window),
)
"""All that is known of GPT-Neo beside the registered plans."""

translate_state_dict_to_hf_gptneo = to_hf_function(
    TABLE, __name__, "translate_state_dict_to_hf_gptneo"
)
translate_hf_state_dict_to_smdistributed_gptneo = to_smdistributed_function(
    TABLE, __name__, "translate_hf_state_dict_to_smdistributed_gptneo"
)
translate_hf_state_dict_to_tensorpar_gptneo = to_tensorpar_function(
    TABLE, __name__, "translate_hf_state_dict_to_tensorpar_gptneo"
)

# other names that scripts use
translate_hf_gptneo_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gptneo
translate_hf_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gptneo
translate_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_gptneo
