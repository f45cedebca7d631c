"""A folder's files replaced as one: written aside, synced, and put in place by one rename.

What a process that is killed leaves behind, by the moment:

* while the new files are written, or synced: the folder as it was, and a hidden folder beside it;
* after the one rename (the folder did not exist) or the one exchange of names (it did): the new
  folder. Of what else the old one held, files are in both before; subfolders follow after the
  exchange, and if the process is killed before they have, the next save moves them.

Where names cannot be exchanged (the folder is a mount point, the working directory, or on a file
system without hard links or `renameat2`), files are renamed one by one: each is old or new. Where
only one of them changes, so is the folder; where several do, there is no index between the first
rename and the last, so that shards of two saves are never loaded as one model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorpar.files.disk import exchange_names, lives, sync

_FILES, _MARKER = "files", "exchange.json"
#: files up to this size are compared, to leave one that would not change.
_SMALL = 1 << 20


@contextmanager
def replacing(folder: str | os.PathLike[str], stale: Callable[[str], bool]) -> Iterator[Path]:
    """Within: an empty folder to write files into; at the end they are in `folder`, all or none.

    Args:
        folder: made if absent; files of other names stay in it.
        stale: whether an old file of this name, if it is not written anew, is to go.

    Raises:
        ValueError: `folder` is a file.
        OSError: it cannot be written; it is as it was.
    """
    path = Path(os.path.realpath(folder))
    if path.exists() and not path.is_dir():
        raise ValueError(f"save_directory = {str(folder)!r} is a file, required: a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    exchangeable = not path.exists() or _is_exchangeable(path)
    aside = _make_aside(path.parent if exchangeable else path, path)
    try:
        files = aside / _FILES
        files.mkdir()
        yield files
        for file in files.iterdir():
            sync(file)
        _commit(aside, path, stale, exchangeable=exchangeable)
    finally:
        _discard(aside)


def _commit(aside: Path, path: Path, stale: Callable[[str], bool], *, exchangeable: bool) -> None:
    files = aside / _FILES
    if not path.exists():
        sync(files)
        files.rename(path)
    elif not (exchangeable and _exchange(aside, path, stale)):
        _rename_one_by_one(files, path, stale)
    sync(path)
    sync(path.parent)


def _is_exchangeable(path: Path) -> bool:
    """Whether a folder may get another inode: not one that is mounted, or worked in."""
    here = Path(os.path.realpath("."))
    return (
        not path.is_mount()
        and here != path
        and path not in here.parents
        and os.access(path.parent, os.W_OK | os.X_OK)
    )


def _make_aside(parent: Path, path: Path) -> Path:
    """A hidden folder of this process; what killed ones of this machine left is finished first."""
    prefix = f".{path.name}.{socket.gethostname()}-"
    for left in (*path.parent.glob(f"{prefix}*.saving"), *path.glob(f"{prefix}*.saving")):
        number = re.fullmatch(r"(\d+)\.saving", left.name.removeprefix(prefix))
        if number and not lives(int(number[1])):
            _finish_exchange(left, path)
            _discard(left)
    aside = parent / f"{prefix}{os.getpid()}.saving"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    return aside


def _exchange(aside: Path, path: Path, stale: Callable[[str], bool]) -> bool:
    """Swap the new folder with the old one; False, with nothing changed, where that cannot be."""
    files, marker = aside / _FILES, aside / _MARKER
    linked = _link_others(files, path, stale)
    if linked is not None:
        gone = [
            old.name for old in path.iterdir() if (files / old.name).exists() or stale(old.name)
        ]
        marker.write_text(json.dumps({"inode": files.stat().st_ino, "gone": gone}))
        for written in (marker, files, aside):
            sync(written)
        if exchange_names(files, path):
            sync(path.parent)
            _finish_exchange(aside, path)
            return True
        marker.unlink()
    for link in linked or ():
        link.unlink()
    return False


def _link_others(files: Path, path: Path, stale: Callable[[str], bool]) -> list[Path] | None:
    """Put what the old folder also holds into the new one; None where links cannot be made."""
    shutil.copymode(path, files)
    linked: list[Path] = []
    for old in path.iterdir():
        new = files / old.name
        if os.path.lexists(new) or stale(old.name) or (old.is_dir() and not old.is_symlink()):
            continue
        try:
            os.link(old, new, follow_symlinks=False)
        except OSError:
            for link in linked:
                link.unlink()
            return None
        linked.append(new)
    return linked


def _finish_exchange(aside: Path, path: Path) -> None:
    """After an exchange, if there was one: bring over what could not be linked, drop the rest."""
    marker, old_files = aside / _MARKER, aside / _FILES
    if not marker.exists() or not path.exists():
        return
    told = json.loads(marker.read_text())
    if path.stat().st_ino == told["inode"] and old_files.exists():
        for old in old_files.iterdir():
            if old.name not in told["gone"] and not os.path.lexists(path / old.name):
                old.rename(path / old.name)
        sync(path)
    shutil.rmtree(old_files, ignore_errors=True)
    marker.unlink()


def _rename_one_by_one(files: Path, path: Path, stale: Callable[[str], bool]) -> None:
    written = {file.name for file in files.iterdir()}
    changed = [name for name in sorted(written) if not _same(files / name, path / name)]
    left = [old.name for old in path.iterdir() if stale(old.name) and old.name not in written]
    indices = [name for name in (*changed, *left) if name.endswith(".index.json")]
    if len(changed) + len(left) > 1:
        for name in indices:
            (path / name).unlink(missing_ok=True)
    for name in sorted(changed, key=lambda name: (name in indices, "model" not in name, name)):
        (files / name).replace(path / name)
    for name in left:
        (path / name).unlink(missing_ok=True)


def _discard(aside: Path) -> None:
    """Delete a hidden folder, unless something of the old one is still in it."""
    if not (aside / _MARKER).exists():
        shutil.rmtree(aside, ignore_errors=True)


def _same(new: Path, old: Path) -> bool:
    size = new.stat().st_size
    if not old.is_file() or old.stat().st_size != size or size > _SMALL:
        return False
    return new.read_bytes() == old.read_bytes()
