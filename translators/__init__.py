"""Checkpoints between Hugging Face's layout, tensorpar's and smdistributed's, and between degrees.

The functions here tell the family by the model's config; those of one family, under the names that
scripts use, are in `tensorpar.translators.<family>`. None of them communicates.
"""

from .files import load_hf, save_hf
from .shards import merge, reshard, split
from .translate import from_hf, hf_to_smdistributed, smdistributed_to_hf, to_hf

__all__ = [
    "from_hf",
    "hf_to_smdistributed",
    "load_hf",
    "merge",
    "reshard",
    "save_hf",
    "smdistributed_to_hf",
    "split",
    "to_hf",
]
