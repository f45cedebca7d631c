"""BERT: the table of smdistributed's layout, and the functions under the names scripts use.

Axes: `v` vocabulary, `p` positions, `t` token types, `h` hidden, `a` = heads x head size, `f`
intermediate. Both sides keep weights `[out, in]`; what is not in a layer keeps its name, and the
pooler and all heads pass through.
"""

from .functions import to_hf_function, to_smdistributed_function, to_tensorpar_function
from .table import Rule, Table, pair, rule

_NORM = ("h -> h", "h -> h")


def encoder_table(family: str) -> Table:
    """The table of BERT, and of the families that share its structure and names."""
    hf, smd = f"{family}.encoder.layer.{{i}}", f"{family}.encoder.seq_layers.{{i}}"
    embeddings = f"{family}.embeddings"
    kept = {"word_embeddings": "v", "position_embeddings": "p", "token_type_embeddings": "t"}
    tables = ((f"{embeddings}.{name}.weight", axis) for name, axis in kept.items())
    rules = (
        *(rule(key, key, f"{axis} h -> {axis} h") for key, axis in tables),
        *pair(f"{embeddings}.LayerNorm", f"{embeddings}.LayerNorm", *_NORM),
        *_attention(f"{hf}.attention", f"{smd}.attention"),
        *pair(f"{hf}.intermediate.dense", f"{smd}.output.dense1", "f h -> f h", "f -> f"),
        *pair(f"{hf}.output.dense", f"{smd}.output.dense2", "h f -> h f", "h -> h", row=True),
        *pair(f"{hf}.output.LayerNorm", f"{smd}.output.layernorm", *_NORM),
    )
    trunk = (f"{embeddings}.", f"{family}.encoder.")
    return Table(
        family=family,
        rules=rules,
        extras=(_attention(f"{hf}.crossattention", f"{smd}.cross_attention"),),
        hf_prefix=f"{family}.",
        smd_prefix=f"{family}.",
        hf_trunk=trunk,
        smd_trunk=trunk,
        dropped=("embeddings.position_ids",),
    )


def _attention(hf: str, smd: str) -> tuple[Rule, ...]:
    return (
        *pair(f"{hf}.self.query", f"{smd}.query", "a h -> a h", "a -> a"),
        *pair(f"{hf}.self.key", f"{smd}.key", "a h -> a h", "a -> a"),
        *pair(f"{hf}.self.value", f"{smd}.value", "a h -> a h", "a -> a"),
        *pair(f"{hf}.output.dense", f"{smd}.dense", "h a -> h a", "h -> h", row=True),
        *pair(f"{hf}.output.LayerNorm", f"{smd}.layernorm", *_NORM),
    )


TABLE = encoder_table("bert")
"""All that is known of BERT beside the registered plans."""

translate_state_dict_to_hf_bert = to_hf_function(TABLE, __name__, "translate_state_dict_to_hf_bert")
translate_hf_state_dict_to_smdistributed_bert = to_smdistributed_function(
    TABLE, __name__, "translate_hf_state_dict_to_smdistributed_bert"
)
translate_hf_state_dict_to_tensorpar_bert = to_tensorpar_function(
    TABLE, __name__, "translate_hf_state_dict_to_tensorpar_bert"
)

# other names that scripts use
translate_hf_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_bert
translate_state_dict_to_smdistributed = translate_hf_state_dict_to_smdistributed_bert
