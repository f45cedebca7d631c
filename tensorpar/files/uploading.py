"""Pushing what ranks save together: all save, the first uploads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def push_together(model: Any, push: Callable[[], T], **saving: Any) -> T | None:
    """What `push` returns, on the first rank, which alone calls it; None on others.

    Collective until all have saved; the others do not wait for the upload, which may take longer
    than a collective does.

    Args:
        model: whose `save_pretrained` is collective, and which `push` calls for a folder.
        push: the method of Transformers or peft that makes a repository, saves and uploads.
        saving: arguments of `save_pretrained`.
    """
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, **saving)
        if dist.get_rank() != 0:
            return None

        def move(save_directory: str | os.PathLike[str], **_: Any) -> None:
            for file in Path(folder).iterdir():
                shutil.move(file, save_directory)

        # in front of the method, which the other ranks would have to call again
        model.__dict__["save_pretrained"] = move
        try:
            return push()
        finally:
            del model.__dict__["save_pretrained"]
