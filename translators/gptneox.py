"""GPT-NeoX: Hugging Face's layout and tensorpar's; smdistributed's is not known for it.

q, k and v interleave within each head in Hugging Face's fused weight and bias; the registered plan
says so, and nothing is left to say here but which buffers old versions kept.
"""

from .functions import to_hf_function, to_tensorpar_function
from .table import Table

TABLE = Table(
    family="gpt_neox",
    rules=(),
    hf_prefix="gpt_neox.",
    hf_trunk=("gpt_neox.",),
    dropped=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)
"""All that is known of GPT-NeoX beside the registered plans."""

translate_state_dict_to_hf_gptneox = to_hf_function(
    TABLE, __name__, "translate_state_dict_to_hf_gptneox"
)
translate_hf_state_dict_to_tensorpar_gptneox = to_tensorpar_function(
    TABLE, __name__, "translate_hf_state_dict_to_tensorpar_gptneox"
)
