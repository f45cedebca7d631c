"""GPT-2's translate functions; they live in `tensorpar.translators.gpt2`."""

from tensorpar.translators.gpt2 import (
    translate_hf_state_dict_to_smdistributed,
    translate_hf_state_dict_to_smdistributed_gpt2,
    translate_hf_state_dict_to_smdistributed_gpt2_layer,
    translate_hf_state_dict_to_tensorpar_gpt2,
    translate_state_dict_to_hf_gpt2,
    translate_state_dict_to_hf_gpt2_layer,
    translate_state_dict_to_smdistributed,
)

__all__ = [
    "translate_hf_state_dict_to_smdistributed",
    "translate_hf_state_dict_to_smdistributed_gpt2",
    "translate_hf_state_dict_to_smdistributed_gpt2_layer",
    "translate_hf_state_dict_to_tensorpar_gpt2",
    "translate_state_dict_to_hf_gpt2",
    "translate_state_dict_to_hf_gpt2_layer",
    "translate_state_dict_to_smdistributed",
]
