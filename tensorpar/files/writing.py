"""Safetensors files written tensor by tensor, each made when its place in the file is reached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tensorpar.files.disk import reserve, start_writing
from tensorpar.files.positioned import bytes_of, write_from
from tensorpar.files.safetensors_header import TensorSpec, decode, encode
from tensorpar.promise import origin_of

#: writes some of a file's tensors in another way: is given the open file, its path, and origin and
#: place of each; returns the names of those that it has written. What the file begins with is free.
Ahead = Callable[[int, str, Mapping[str, tuple[Any, int]]], Collection[str]]


def write_weights(
    tensors: Mapping[str, torch.Tensor],
    filename: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
    ahead: Ahead | None = None,
) -> None:
    """Write what `safetensors.torch.save_file` would, byte for byte.

    Args:
        tensors: by name; promises, whose origins are called for the values in the order in which
            these lie in the file; one is called while what the one before returned is written,
            so two memories in turn will do. Tensors that are there already go to safetensors' own
            function.
        filename: the file; overwritten.
        metadata: for its header.
        ahead: writes promised tensors whose origins then need not be called.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    if any(origin_of(tensor) is None for tensor in tensors.values()):
        save_file(dict(tensors), filename, metadata=None if metadata is None else dict(metadata))
        return
    specs = {name: TensorSpec(x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    start = encode(specs, metadata or {})
    header = decode(start, len(start) + sum(spec.num_bytes for spec in specs.values()))
    with Path(filename).open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
        handle = file.fileno()
        reserve(handle, header.num_bytes)
        done: Collection[str] = ()
        if ahead is not None:
            places = {name: (origin_of(tensors[name]), at) for name, at in header.offsets.items()}
            done = ahead(handle, str(filename), places)
        written = writer.submit(_put, handle, memoryview(start), 0)
        for name in (name for name in header.offsets if name not in done):
            values = bytes_of(origin_of(tensors[name])())
            written.result()
            written = writer.submit(_put, handle, values, header.offsets[name])
        written.result()


def _put(handle: int, memory: memoryview, offset: int) -> None:
    write_from(handle, memory, offset)
    start_writing(handle, offset, len(memory))
