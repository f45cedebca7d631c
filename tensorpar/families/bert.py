"""BERT, and the models that share its structure and names."""

from tensorpar.registry import Stream, register
from tensorpar.styles import Column, OwnParameter, Row, VocabParallel

NAME = "bert"
MODULE = "transformers.models.bert.modeling_bert"


def register_encoder(module: str, prefix: str) -> None:
    """Annotate the classes `{module}.{prefix}...` that hold embeddings, attention and MLP."""
    heads, counts = "num_attention_heads", ("num_attention_heads", "all_head_size")
    register(
        f"{module}.{prefix}SelfAttention",
        query=Column(heads=heads),
        key=Column(heads=heads),
        value=Column(heads=heads),
        divide=counts,
        enter=("hidden_states",),
        at={"attention.self": {}},
    )
    register(
        f"{module}.{prefix}CrossAttention",
        query=Column(heads=heads),
        key=Column(heads=heads),
        value=Column(heads=heads),
        divide=counts,
        enter=("hidden_states", "encoder_hidden_states"),
        at={"crossattention.self": {}},
    )
    # the output layer does not know the head count: it is annotated from the module above both
    register(
        f"{module}.{prefix}Attention",
        output__dense=Row(heads=f"self.{heads}"),
        at={"attention": {}, "crossattention": {}},
    )
    register(
        f"{module}.{prefix}Intermediate",
        dense=Column(),
        enter=("hidden_states",),
        at={"intermediate": {}},
    )
    register(f"{module}.{prefix}Output", dense=Row(), at={"layer.*.output": {}})
    register(f"{module}.{prefix}Encoder", stream=Stream("layer"))
    register(f"{module}.{prefix}Embeddings", word_embeddings=VocabParallel(), at={"embeddings": {}})


register_encoder(MODULE, "Bert")
# the head's own bias is the decoder's, tied
register(
    f"{MODULE}.BertLMPredictionHead",
    decoder=VocabParallel(),
    bias=OwnParameter("v -> v", cut="v"),
    at={"cls.predictions": {}},
)
