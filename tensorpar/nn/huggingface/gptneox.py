"""GPT-NeoX's translate functions; they live in `tensorpar.translators.gptneox`."""

from tensorpar.translators.gptneox import (
    translate_hf_state_dict_to_tensorpar_gptneox,
    translate_state_dict_to_hf_gptneox,
)

__all__ = [
    "translate_hf_state_dict_to_tensorpar_gptneox",
    "translate_state_dict_to_hf_gptneox",
]
