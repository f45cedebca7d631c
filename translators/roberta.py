"""RoBERTa: BERT's table under its own prefix, and the functions under the names scripts use."""

from .bert import encoder_table
from .functions import to_hf_function, to_smdistributed_function, to_tensorpar_function

TABLE = encoder_table("roberta")
"""All that is known of RoBERTa beside the registered plans."""

translate_state_dict_to_hf_roberta = to_hf_function(
    TABLE, __name__, "translate_state_dict_to_hf_roberta"
)
translate_hf_state_dict_to_smdistributed_roberta = to_smdistributed_function(
    TABLE, __name__, "translate_hf_state_dict_to_smdistributed_roberta"
)
translate_hf_state_dict_to_tensorpar_roberta = to_tensorpar_function(
    TABLE, __name__, "translate_hf_state_dict_to_tensorpar_roberta"
)

# other names that scripts use
translate_hf_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_roberta
translate_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_roberta
