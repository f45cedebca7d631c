"""A folder of checkpoints: which are complete, which is the newest, and how one becomes so.

A checkpoint is written aside and renamed when every rank's files and its metadata are on disk.
`complete.json`, written last, has the checksum of the metadata: a folder without it, or with
another, is no checkpoint. There is no pointer that could go stale: the newest is the one with the
highest step. On object stores, which cannot rename folders, `complete.json` alone decides.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import _StorageReaderTransforms

from tensorpar.checkpoint.checksummed import Checksummed, registry
from tensorpar.files.disk import sync

_NAME = re.compile(r"step-(\d+)")
_COMPLETE, _METADATA = "complete.json", ".metadata"


class CheckpointFolder:
    """The folder in which one run keeps its checkpoints.

    Args:
        path: a local path, or a URL that fsspec knows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._files, root = fsspec.url_to_fs(path)
        self._root = PurePosixPath(root)
        self._is_local = isinstance(self._files, LocalFileSystem)
        # fsspec remembers listings of object stores, and other processes write there too
        self._files.invalidate_cache()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        if not self._files.isdir(str(self._root)):
            return []
        names = (PurePosixPath(name).name for name in self._files.ls(str(self._root), detail=False))
        found = (int(match[1]) for name in names if (match := _NAME.fullmatch(name)))
        return sorted(step for step in found if self._files.exists(self._file(step, _COMPLETE)))

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's metadata, if anything."""
        try:
            stated = json.loads(self._files.cat_file(self._file(step, _COMPLETE)))
            crc = zlib.crc32(self._files.cat_file(self._file(step, _METADATA)))
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return None if stated == {"metadata crc32": crc} else "its metadata has another checksum"

    def writer(self, step: int) -> FsspecWriter:
        """torch's writer of the checkpoint of `step`, aside."""
        return FsspecWriter(self._url(self._aside(step)), _extensions=[Checksummed()])

    def reader(self, step: int) -> FsspecReader:
        """torch's reader of the checkpoint of `step`."""
        reader = FsspecReader(self._url(self._final(step)))
        reader.transforms = _StorageReaderTransforms(registry())
        return reader

    def prepare(self, step: int) -> None:
        """Remove what saves that were interrupted have left; one rank.

        On object stores also the checkpoint of the same step, which is written in its place.
        """
        self._files.makedirs(str(self._root), exist_ok=True)
        complete = {self._final(one) for one in self.steps() if self._is_local or one != step}
        for name in self._files.ls(str(self._root), detail=False):
            own = PurePosixPath(name).name
            if _NAME.fullmatch(own.removeprefix(".")) and own not in complete:
                self._remove(own)
        self._files.makedirs(str(self._root / self._aside(step)), exist_ok=True)

    def complete(self, step: int, keep: int | None) -> None:
        """Everything is written: make it a checkpoint, and remove the oldest beyond `keep`."""
        aside = self._root / self._aside(step)
        crc = zlib.crc32(self._files.cat_file(str(aside / _METADATA)))
        self._files.pipe_file(str(aside / _COMPLETE), json.dumps({"metadata crc32": crc}).encode())
        if self._is_local:
            for name in [*self._files.ls(str(aside), detail=False), str(aside)]:
                sync(name)
            self._remove(self._final(step))
            Path(aside).rename(self._root / self._final(step))
            sync(str(self._root))
        for old in self.steps()[:-keep] if keep else []:
            self._remove(self._final(old))

    def abandon(self, step: int) -> None:
        """Remove what was written of a checkpoint that cannot be completed."""
        self._remove(self._aside(step))

    def _remove(self, name: str) -> None:
        """First what makes it a checkpoint, so that one half removed is none."""
        place = self._root / name
        for each in (str(place / _COMPLETE), str(place)):
            if self._files.exists(each):
                self._files.rm(each, recursive=True)

    def _final(self, step: int) -> str:
        return f"step-{step:09d}"

    def _aside(self, step: int) -> str:
        return f".{self._final(step)}" if self._is_local else self._final(step)

    def _file(self, step: int, name: str) -> str:
        return str(self._root / self._final(step) / name)

    def _url(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"
