"""One table per model family; importing this registers them all, by name, without transformers."""

from tensorpar.families import (  # noqa: F401  (gpt_neox has no translators)
    bert,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    roberta,
)

FAMILIES: dict[str, str] = {
    family.NAME: family.MODULE for family in (gpt2, bert, roberta, gptj, gpt_neo)
}
"""Transformers' `model_type` to the dotted prefix of a family's plans; those with translators."""
