"""BERT's translate functions; they live in `tensorpar.translators.bert`."""

from tensorpar.translators.bert import (
    translate_hf_state_dict_to_smdistributed,
    translate_hf_state_dict_to_smdistributed_bert,
    translate_hf_state_dict_to_tensorpar_bert,
    translate_state_dict_to_hf_bert,
    translate_state_dict_to_smdistributed,
)

__all__ = [
    "translate_hf_state_dict_to_smdistributed",
    "translate_hf_state_dict_to_smdistributed_bert",
    "translate_hf_state_dict_to_tensorpar_bert",
    "translate_state_dict_to_hf_bert",
    "translate_state_dict_to_smdistributed",
]
