"""Checkpoints between Hugging Face's layout, tensorpar's and smdistributed's, and between degrees.

The functions here tell the family by the model's config; those of one family, under the names that
scripts use, are in `tensorpar.translators.<family>`. None of them communicates.
"""

from .files import load_hf, save_hf
from .optimizer import (
    merge_optimizer,
    optimizer_from_hf,
    optimizer_to_hf,
    reshard_optimizer,
    split_optimizer,
)
from .shards import merge, reshard, split
from .translate import from_hf, hf_to_smdistributed, smdistributed_to_hf, to_hf

__all__ = [
    "from_hf",
    "hf_to_smdistributed",
    "load_hf",
    "merge",
    "merge_optimizer",
    "optimizer_from_hf",
    "optimizer_to_hf",
    "reshard",
    "reshard_optimizer",
    "save_hf",
    "smdistributed_to_hf",
    "split",
    "split_optimizer",
    "to_hf",
]
