"""Memory for weights and logits, which comes in a few large pages or in very many small ones."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch._subclasses import FakeTensor

#: what x86 and most ARM systems call a huge page.
_LARGE_PAGE = 1 << 21


def empty_in_large_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` on the CPU, in large pages as far as the system has these.

    Filling new memory takes as long as the system needs to hand out its pages: of 4 kB each, that
    is several times what copying the values takes.
    """
    out = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if isinstance(out, FakeTensor):
        return out
    first = -(-out.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    end = (out.data_ptr() + out.nbytes) // _LARGE_PAGE * _LARGE_PAGE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or first >= end:
        return out
    if (advise := getattr(ctypes.CDLL(None), "madvise", None)) is not None:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)
    return out
