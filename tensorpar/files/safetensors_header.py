"""The header of a safetensors file: where in it which tensor lies, parsed and planned.

The file is eight bytes that count the header's, the header as JSON, and the tensors without gaps.
Knowing the shapes is enough to write the header, so tensors can be written in any order, in place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

#: the format's names of dtypes, in the order in which its library puts them into a file.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_LENGTH_BYTES, _ALIGNMENT = 8, 8
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is without its values.

    Attributes:
        dtype: torch's.
        shape: its sizes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A parsed or planned header.

    Attributes:
        metadata: strings beside the tensors.
        tensors: by name, in the order in which they lie in the file.
        offsets: by name, where in the file a tensor's first byte lies.
        num_bytes: the length of the whole file.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    num_bytes: int


def encode(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The bytes that a file of these tensors begins with, as safetensors' own library writes them.

    Raises:
        ValueError: a dtype that the format does not know.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in in_file_order(tensors):
        spec = tensors[name]
        stop = start + spec.num_bytes
        content[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def in_file_order(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """The names in the order in which safetensors' own library writes them.

    Raises:
        ValueError: a dtype that the format does not know.
    """
    if odd := {spec.dtype for spec in tensors.values() if spec.dtype not in _NAMES}:
        raise ValueError(f"dtypes = {sorted(map(str, odd))}, required: those of safetensors")
    return sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))


def decode(start: bytes, num_bytes: int) -> Header:
    """The header of a file of `num_bytes` that begins with `start`; raises as `read_header`."""
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    first = _LENGTH_BYTES + length
    if len(start) < first:
        raise ValueError(f"its header should have {length} bytes, which the file does not")
    content = json.loads(start[_LENGTH_BYTES:first].decode(), object_pairs_hook=_distinct)
    if not isinstance(content, dict):
        raise TypeError("its header is no mapping")
    metadata = content.pop("__metadata__", {})
    if any(not isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not strings")
    ends = {name: _parsed(name, value) for name, value in content.items()}
    tensors, offsets, end = {}, {}, 0
    for name, (spec, begin, stop) in sorted(ends.items(), key=lambda item: item[1][1:]):
        if begin != end or stop - begin != spec.num_bytes:
            raise ValueError(
                f"{name} {spec.shape} {spec.dtype} lies at {begin} to {stop}, required: "
                f"{end} to {end + spec.num_bytes}"
            )
        tensors[name], offsets[name], end = spec, first + begin, stop
    if first + end != num_bytes:
        raise ValueError(f"it has {num_bytes} bytes, required by its header: {first + end}")
    return Header(metadata, tensors, offsets, first + end)


def read_header_bytes(path: Path) -> bytes:
    """The file's beginning, up to the end of its header."""
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        return start + file.read(min(length, _MAX_HEADER))


def read_header(path: Path) -> Header:
    """The header of a file; no value is read.

    Raises:
        ValueError: the file is truncated, too long, or its header is not one: tensors that overlap,
            gaps, sizes that do not fit the shapes.
    """
    try:
        return decode(read_header_bytes(path), path.stat().st_size)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), required: a whole safetensors file; fetch it again"
        ) from None


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name} stands twice in its header")
        content[name] = value
    return content


def _parsed(name: str, value: Any) -> tuple[TensorSpec, int, int]:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and offsets, or more than these")
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the dtype {value['dtype']!r}, required: {list(DTYPES)}")
    shape, (begin, stop) = tuple(value["shape"]), value["data_offsets"]
    if any(type(size) is not int or size < 0 for size in (*shape, begin, stop)):
        raise ValueError(f"{name} has sizes that are no positive integers")
    return TensorSpec(DTYPES[value["dtype"]], shape), begin, stop
