"""What the operating system promises of files that must survive a crash."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 2, 2


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserve(handle: int, num_bytes: int) -> bool:
    """Give an open file its length and its place on the disk, if the file system can do that.

    Returns:
        Whether it has them.

    Raises:
        OSError: the disk has no room for it.
    """
    # os.posix_fallocate would write into every block where the file system cannot
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None or not num_bytes:
        return not num_bytes
    if allocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)) != 0:
        error = ctypes.get_errno()
        if error in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error, os.strerror(error))
        return False
    return True


def start_writing(handle: int, offset: int, num_bytes: int) -> None:
    """Begin to bring what was written to the disk, so that `sync` has less to wait for.

    Nothing is promised and nothing waited for; where the system has no such call, nothing is done.
    """
    start = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if start is not None and num_bytes:
        place = ctypes.c_int64(offset), ctypes.c_int64(num_bytes)
        start(handle, *place, _SYNC_FILE_RANGE_WRITE)


def exchange_names(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step, if that can be; Linux can on most file systems."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    done: int = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return done == 0


def lives(process: int) -> bool:
    """Whether a process of this machine has not ended, so that what it left is still its own."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
