"""What the system is told about memory: that it may come in large pages, that a file will be read.

Both are advice: where the system knows no such advice, or does not take it, nothing is different
but the time.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache

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
    _advise("MADV_HUGEPAGE", first, end)
    return out


def will_be_read(view: torch.Tensor) -> None:
    """Have the system fetch all that lies under a view of a mapped file, before it is read.

    The system reads ahead a little of what is read in order, which does not keep a disk busy. Of a
    view with strides it sees pages left out, takes that for reading at random, and fetches each
    page when it is needed.
    """
    if not view.numel():
        return
    strides = zip(view.shape, view.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides)
    end = view.data_ptr() + (last + 1) * view.element_size()
    _advise("MADV_WILLNEED", view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end)


def _advise(advice: str, first: int, end: int) -> None:
    number = getattr(mmap, advice, None)
    if number is None or first >= end:
        return
    if (advise := getattr(_c_library(), "madvise", None)) is not None:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), number)


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
