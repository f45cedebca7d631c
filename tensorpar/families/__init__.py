"""One table per model family; importing this registers them all, by name, without transformers."""

from tensorpar.families import gpt2

FAMILIES = {gpt2.NAME: gpt2.MODULE}
"""Transformers' `model_type` to the dotted prefix of the family's rows."""
