"""RoBERTa: BERT's structure with a head of its own."""

from tensorpar.families.bert import register_encoder
from tensorpar.registry import register
from tensorpar.styles import OwnParameter, VocabParallel

NAME = "roberta"
MODULE = "transformers.models.roberta.modeling_roberta"

register_encoder(MODULE, "Roberta")
# the head's own bias is the decoder's, tied
register(
    f"{MODULE}.RobertaLMHead",
    decoder=VocabParallel(),
    bias=OwnParameter("v -> v", cut="v"),
    at={"lm_head": {}},
)
