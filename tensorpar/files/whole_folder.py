"""Folders that appear whole or not at all: written aside, synced, and renamed."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorpar.files.disk import exchange_names, lives, sync


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Within: a folder aside to write into; it is at `path` afterwards, or nothing is.

    Args:
        path: must not exist, or be an empty folder.

    Raises:
        ValueError: it exists and is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists, required: a new or empty folder; move it away first")
    aside = make_aside(path)
    try:
        yield aside
        commit(aside, path)
    finally:
        discard(aside)


def make_aside(path: Path) -> Path:
    """A new folder beside `path` to write into; what killed processes of this machine left goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{socket.gethostname()}-"
    for left in path.parent.glob(f"{prefix}*"):
        number = re.fullmatch(r"(\d+)\.unfinished", left.name.removeprefix(prefix))
        if number and not lives(int(number[1])):
            discard(left)
    aside = path.parent / f"{prefix}{os.getpid()}.unfinished"
    discard(aside)
    aside.mkdir()
    return aside


def discard(aside: Path) -> None:
    """Delete a folder that is not to be, if it is there."""
    shutil.rmtree(aside, ignore_errors=True)


def commit(aside: Path, path: Path) -> None:
    """Put a finished folder where it belongs; one that was there is gone afterwards.

    Its files are synced first. At any moment `path` is the old folder or the new one, on file
    systems that can exchange names in one step (Linux's ext4, xfs, btrfs and tmpfs can).
    """
    for file in aside.iterdir():
        sync(file)
    sync(aside)
    if path.exists() and any(path.iterdir()):
        if not exchange_names(aside, path):
            old = aside.with_name(f"{aside.name}.old")
            path.rename(old)
            aside.rename(path)
            discard(old)
        discard(aside)
    else:
        aside.rename(path)
    sync(path.parent)
