"""What stands in the headers of sharded files: one safetensors file per tensor-parallel rank.

A file is a valid safetensors file of its own, with the keys and the local shapes of that rank. Its
metadata tell the rest, so that neither the model's class nor its config is needed to put the ranks
together or to cut them anew:

    format          "tensorpar"
    format_version  "1"
    layout          "tensorpar": names are Hugging Face's, axes are ours
    degree, rank    of tensor parallelism
    tensors         JSON: name to global shape, sharded dim or null, [start, stop) of it, CRC-32
    ties            JSON: further names, each with the name under which its tensor is kept
    config          JSON: the model's config, or null
    checkpoint      digest of all ranks' checksums: files of two saves never mix
    header_crc32    of the header itself, with this field zero

Replicated tensors are in every file. Checksums have fixed width, so they are written last.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensorpar.files.safetensors_header import Header, TensorSpec, decode, encode, read_header_bytes
from tensorpar.partition import chunk_bounds

FORMAT, VERSION, LAYOUT = "tensorpar", "1", "tensorpar"
_FILE_NAME = re.compile(r"tensorpar-(\d{5})-of-(\d{5})\.safetensors")
_OWN_CRC = re.compile(rb'("header_crc32":")([0-9a-f]{8})(")')
_NO_CRC, _NO_DIGEST = "0" * 8, "0" * 16


@dataclass(frozen=True)
class Slice:
    """Which part of a tensor a rank's file holds.

    Attributes:
        shape: of the whole tensor.
        dim: the sharded dim; None where every file holds all of it.
        start: the first index of that dim; 0 for None.
        stop: the index after the last; 0 for None.
        crc32: of the part's bytes, eight hexadecimal digits.
    """

    shape: tuple[int, ...]
    dim: int | None
    start: int
    stop: int
    crc32: str = _NO_CRC

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class RankHeader:
    """What one file says of itself.

    Attributes:
        rank: of tensor parallelism.
        degree: how many files there are.
        slices: by name, what this file holds.
        dtypes: by name.
        ties: further names of tensors.
        config: the model's, or None.
        checkpoint: the digest common to all files.
        offsets: by name, where in the file the tensor's bytes begin.
    """

    rank: int
    degree: int
    slices: Mapping[str, Slice]
    dtypes: Mapping[str, Any]
    ties: Mapping[str, str]
    config: Mapping[str, Any] | None
    checkpoint: str = _NO_DIGEST
    offsets: Mapping[str, int] | None = None

    def with_checksums(self, checksums: Mapping[str, int], checkpoint: str) -> RankHeader:
        """The same header, of the same length, with what is known once all is written."""
        slices = {
            name: replace(part, crc32=f"{checksums[name]:08x}")
            for name, part in self.slices.items()
        }
        return replace(self, slices=slices, checkpoint=checkpoint)

    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and local shape of every tensor in the file."""
        return {
            name: TensorSpec(self.dtypes[name], part.local_shape)
            for name, part in self.slices.items()
        }


def file_name(rank: int, degree: int) -> str:
    """The name of a rank's file."""
    return f"tensorpar-{rank:05d}-of-{degree:05d}.safetensors"


def is_file_name(name: str) -> bool:
    """Whether a file of this name is a rank's."""
    return _FILE_NAME.fullmatch(name) is not None


def slice_of(shape: Sequence[int], dim: int | None, degree: int, rank: int) -> Slice:
    """The part of a tensor that a rank of `degree` holds."""
    if dim is None:
        return Slice(tuple(shape), None, 0, 0)
    return Slice(tuple(shape), dim, *chunk_bounds(shape[dim], degree, rank))


def header_bytes(header: RankHeader) -> bytes:
    """The bytes a rank's file begins with."""
    tensors = {
        name: {
            "shape": part.shape,
            "dim": part.dim,
            "start": part.start,
            "stop": part.stop,
            "crc32": part.crc32,
        }
        for name, part in header.slices.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        "layout": LAYOUT,
        "degree": str(header.degree),
        "rank": str(header.rank),
        "tensors": _json(tensors),
        "ties": _json(dict(header.ties)),
        "config": _json(None if header.config is None else dict(header.config)),
        "checkpoint": header.checkpoint,
        "header_crc32": _NO_CRC,
    }
    unsigned = encode(header.specs(), metadata)
    return _OWN_CRC.sub(rb"\g<1>%08x\g<3>" % zlib.crc32(unsigned), unsigned, count=1)


def digest(checksums: Sequence[Mapping[str, int]]) -> str:
    """What all files of one save have in common, from each rank's CRC-32 by name."""
    told = [{name: f"{crc:08x}" for name, crc in sorted(one.items())} for one in checksums]
    return hashlib.sha256(_json(told).encode()).hexdigest()[: len(_NO_DIGEST)]


def read_checkpoint(folder: Path) -> list[RankHeader]:
    """The headers of all ranks' files, in order; no value is read.

    Raises:
        ValueError: a file that is missing, truncated or altered in its header, or files that are
            not of one save.
    """
    names = sorted(path.name for path in folder.iterdir() if is_file_name(path.name))
    if not names:
        raise ValueError(f"{folder} has no files named {file_name(0, 1)!r}, required: all ranks'")
    headers = [read_rank_header(folder / name) for name in names]
    expected = [file_name(rank, headers[0].degree) for rank in range(headers[0].degree)]
    if names != expected:
        raise ValueError(f"{folder} has {names}, required: {expected}")
    if problems := _disagreements(headers):
        raise ValueError(f"{folder} holds files that are not of one save: {'; '.join(problems)}")
    return headers


def read_rank_header(path: Path) -> RankHeader:
    """The header of one file.

    Raises:
        ValueError: the file is truncated, of another format or version, or its header was altered.
    """
    try:
        start = read_header_bytes(path)
        _check_own_crc(start)
        header = decode(start, path.stat().st_size)
        return _parsed(header)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}), required: a whole file of save_sharded"
        ) from None


def _check_own_crc(start: bytes) -> None:
    found = list(_OWN_CRC.finditer(start))
    if not found:
        raise ValueError("no header_crc32 in its header: another format")
    zeroed = _OWN_CRC.sub(rb"\g<1>00000000\g<3>", start, count=1)
    if zlib.crc32(zeroed) != int(found[0][2], 16):
        raise ValueError("its header was altered")


def _parsed(header: Header) -> RankHeader:
    metadata = header.metadata
    kind = tuple(metadata[name] for name in ("format", "format_version", "layout"))
    if kind != (FORMAT, VERSION, LAYOUT):
        raise ValueError(f"format, version and layout = {kind}, required: {FORMAT, VERSION}")
    slices = {
        name: Slice(tuple(told["shape"]), told["dim"], told["start"], told["stop"], told["crc32"])
        for name, told in json.loads(metadata["tensors"]).items()
    }
    rank, degree = int(metadata["rank"]), int(metadata["degree"])
    for name, part in slices.items():
        if replace(part, crc32=_NO_CRC) != slice_of(part.shape, part.dim, degree, rank):
            raise ValueError(f"{name} is {part}, required: rank {rank}'s of {degree}")
    local = {name: part.local_shape for name, part in slices.items()}
    if local != {name: spec.shape for name, spec in header.tensors.items()}:
        raise ValueError("its tensors are not those that its metadata tell of")
    return RankHeader(
        rank,
        degree,
        slices,
        {name: spec.dtype for name, spec in header.tensors.items()},
        json.loads(metadata["ties"]),
        json.loads(metadata["config"]),
        metadata["checkpoint"],
        header.offsets,
    )


def _disagreements(headers: Sequence[RankHeader]) -> list[str]:
    """By what the files of all ranks differ; each name once."""
    first = headers[0]
    problems = []
    for rank, header in enumerate(headers):
        if (header.rank, header.degree) != (rank, first.degree):
            problems.append(f"file {rank} is rank {header.rank}'s of {header.degree}")
        problems += [
            f"rank {rank} has another {what} than rank 0"
            for what in ("checkpoint", "ties", "config", "dtypes")
            if getattr(header, what) != getattr(first, what)
        ]
        facts, other = (
            {name: (p.shape, p.dim, p.crc32 if p.dim is None else "") for name, p in h.items()}
            for h in (header.slices, first.slices)
        )
        odd = [name for name in {**facts, **other} if facts.get(name) != other.get(name)]
        problems += [f"{name} on rank {rank} is not of rank 0's tensor" for name in odd]
    return problems


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)
