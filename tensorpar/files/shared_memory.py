"""Memory that processes of one machine share, by a file that lies in no disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from tensorpar.files.disk import reserve

_FOLDER = Path("/dev/shm")


def make_shared(num_bytes: int, beginning: bytes) -> Path | None:
    """A new file in memory; None where the system has no such place, or no room in it.

    Delete it as soon as all that need it are attached: it lives on until they are done with it.

    Args:
        num_bytes: its length.
        beginning: what its first bytes are to be.
    """
    try:
        handle, name = tempfile.mkstemp(prefix="tensorpar-", dir=_FOLDER)
    except OSError:
        return None
    path = Path(name)
    try:
        # memory that is not there would end a process when it is touched, without an exception
        if reserve(handle, num_bytes):
            os.pwrite(handle, beginning, 0)
            return path
    except OSError:
        pass
    finally:
        os.close(handle)
    path.unlink()
    return None


def attached(path: Path) -> torch.Tensor:
    """Its bytes, a uint8 vector; every process that asks for it sees what the others write.

    Raises:
        OSError: there is no such file here.
    """
    size = path.stat().st_size
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
