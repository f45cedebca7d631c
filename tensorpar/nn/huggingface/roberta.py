"""RoBERTa's translate functions; they live in `tensorpar.translators.roberta`."""

from tensorpar.translators.roberta import (
    translate_hf_state_dict_to_smdistributed,
    translate_hf_state_dict_to_smdistributed_roberta,
    translate_hf_state_dict_to_tensorpar_roberta,
    translate_state_dict_to_hf_roberta,
    translate_state_dict_to_smdistributed,
)

__all__ = [
    "translate_hf_state_dict_to_smdistributed",
    "translate_hf_state_dict_to_smdistributed_roberta",
    "translate_hf_state_dict_to_tensorpar_roberta",
    "translate_state_dict_to_hf_roberta",
    "translate_state_dict_to_smdistributed",
]
