"""What Transformers asks a batch's values for its masks, answered for tensors without values.

As `hf_compat` is for its models: a release that renames one is mended here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def rows_of_one_sequence() -> Iterator[None]:
    """Within: no batch is taken for several sequences packed into a row.

    Where a batch's values are unknown, Transformers assumes that it might be, and makes a mask that
    it would not make for the batch itself.
    """
    from transformers import masking_utils

    usual = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = usual
