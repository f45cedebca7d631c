"""A disk that is full in this process: files cannot grow beyond a size."""

from __future__ import annotations

import functools
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """Within, a write beyond `num_bytes` of any file raises OSError, as on a full disk.

    Python ignores the signal that comes with it.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk_in(owner: type, method: str, num_bytes: int) -> Iterator[None]:
    """Within, the disk is small while `method` runs, and for nothing else.

    Ranks also meet through a file, which must go on growing.
    """
    write = getattr(owner, method)

    @functools.wraps(write)
    def limited(*args: Any, **kwargs: Any) -> Any:
        with small_disk(num_bytes):
            return write(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, limited)
        yield
