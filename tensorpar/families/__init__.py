"""One table per model family; importing this registers them all, by name, without transformers."""

from tensorpar.families import (
    bert,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    roberta,
)

FAMILIES: dict[str, str] = {
    family.NAME: family.MODULE for family in (gpt2, bert, roberta, gptj, gpt_neo, gpt_neox)
}
"""Transformers' `model_type` to the dotted prefix of a family's plans."""
