"""Large tensors in pieces, so that what is copied or sent needs little memory beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

#: what is copied or sent at once.
PIECE_BYTES = 16 << 20


def pieces(shape: Sequence[int], element_size: int) -> Iterator[tuple[slice, ...]]:
    """Slices that together cover a tensor once, each of at most `PIECE_BYTES` if it can be.

    They come in the order of the tensor's memory, if it is contiguous, and so is each of them.

    Args:
        shape: of the tensor; nothing comes of one without elements.
        element_size: in bytes.
    """
    row_bytes = torch.Size(shape[1:]).numel() * element_size
    if not shape or row_bytes == 0:
        if torch.Size(shape).numel():
            yield ()
        return
    num_rows = PIECE_BYTES // row_bytes
    if num_rows:
        for start in range(0, shape[0], num_rows):
            yield (slice(start, min(start + num_rows, shape[0])),)
    else:
        for row in range(shape[0]):
            for rest in pieces(shape[1:], element_size):
                yield (slice(row, row + 1), *rest)
