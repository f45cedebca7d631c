"""Files that are planned from shapes alone, filled in place in any order, and then finished.

What depends on the values, checksums, has a fixed width and is written last.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch.serialization import skip_data

from tensorpar.files.positioned import write_from
from tensorpar.files.safetensors_header import TensorSpec, decode, encode
from tensorpar.files.sharded_format import RankHeader, digest, file_name, header_bytes

from .tensors import MARKERS

#: CRC-32 by key.
Checksums = Mapping[str, int]


class OutFile(Protocol):
    """A file to be written."""

    @property
    def name(self) -> str:
        """Within its folder."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """What is to be in it."""

    @property
    def checksummed(self) -> bool:
        """Whether `finish` needs checksums."""

    def begin(self, path: Path) -> Mapping[str, int]:
        """Create it; the offset of each tensor, whose bytes are not there yet."""

    def finish(self, handle: int, own: Checksums, everyones: Sequence[Checksums]) -> None:
        """Complete it.

        Args:
            handle: the open file.
            own: of its tensors.
            everyones: of all files' tensors, in the files' order.
        """


class SafetensorsFile:
    """One of a Hugging Face folder.

    Args:
        name: the file's.
        tensors: what is to be in it.
    """

    checksummed = False

    def __init__(self, name: str, tensors: Mapping[str, TensorSpec]) -> None:
        self.name, self.tensors = name, tensors

    def begin(self, path: Path) -> Mapping[str, int]:
        """As for `OutFile`."""
        return _begin(path, encode(self.tensors, {"format": "pt"}), self.tensors)

    def finish(self, handle: int, own: Checksums, everyones: Sequence[Checksums]) -> None:
        """Nothing is left to do."""


class ShardedFile:
    """A rank's file of `tensorpar.save_sharded`.

    Args:
        header: without checksums.
    """

    checksummed = True

    def __init__(self, header: RankHeader) -> None:
        self.name, self.tensors = file_name(header.rank, header.degree), header.specs()
        self._header = header

    def begin(self, path: Path) -> Mapping[str, int]:
        """As for `OutFile`."""
        return _begin(path, header_bytes(self._header), self.tensors)

    def finish(self, handle: int, own: Checksums, everyones: Sequence[Checksums]) -> None:
        """Write the header with its checksums."""
        header = self._header.with_checksums(own, digest(everyones))
        write_from(handle, memoryview(header_bytes(header)), 0)


class TorchFile:
    """A file as `torch.save` writes it: a rank's of smdistributed, or a full one.

    Args:
        name: the file's.
        tensors: what is to be in it.
        partial: whether it is a rank's.
    """

    checksummed = True

    def __init__(self, name: str, tensors: Mapping[str, TensorSpec], *, partial: bool) -> None:
        self.name, self.tensors = name, tensors
        self._markers = {MARKERS[0]: True} if partial else {}
        self._records: dict[str, tuple[int, int, int]] = {}

    def begin(self, path: Path) -> Mapping[str, int]:
        """As for `OutFile`; the memory of the tensors that are saved is never touched."""
        content = {
            key: torch.empty(spec.shape, dtype=spec.dtype) for key, spec in self.tensors.items()
        }
        try:
            with skip_data():
                torch.save(content | self._markers, path)
        except RuntimeError as error:  # all that torch's own writer tells of a full disk
            raise OSError(f"{self.name} cannot be written: {error}") from None
        # storages are numbered in the order in which they are met
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            entries = _central_entries(file.fileno(), archive.start_dir)
        with path.open("rb") as file:
            for number, key in enumerate(self.tensors):
                info = infos[f"data/{number}"]
                file.seek(info.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                offset = info.header_offset + 30 + name_length + extra_length
                self._records[key] = offset, info.file_size, entries[info.filename]
        return {key: offset for key, (offset, _, _) in self._records.items()}

    def finish(self, handle: int, own: Checksums, everyones: Sequence[Checksums]) -> None:  # noqa: ARG002
        """Write the checksums that zip archives have, so that other tools read it too."""
        for key, (offset, size, entry) in self._records.items():
            crc = memoryview(struct.pack("<I", own[key]))
            if os.pread(handle, 4, offset + size) == b"PK\x07\x08":
                write_from(handle, crc, offset + size + 4)
            write_from(handle, crc, entry + 16)


def _central_entries(handle: int, start: int) -> dict[str, int]:
    """By name, where a zip archive's list of contents has an entry."""
    entries = {}
    while os.pread(handle, 4, start) == b"PK\x01\x02":
        lengths = struct.unpack("<HHH", os.pread(handle, 6, start + 28))
        entries[os.pread(handle, lengths[0], start + 46).decode()] = start
        start += 46 + sum(lengths)
    return entries


def _begin(path: Path, start: bytes, tensors: Mapping[str, TensorSpec]) -> Mapping[str, int]:
    path.write_bytes(start)
    return decode(start, len(start) + sum(spec.num_bytes for spec in tensors.values())).offsets
