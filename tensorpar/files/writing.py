"""Safetensors files written tensor by tensor, each made when its place in the file is reached."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file

from tensorpar.files.disk import reserve, start_writing
from tensorpar.files.positioned import bytes_of, write_from
from tensorpar.files.safetensors_header import TensorSpec, encode, in_file_order
from tensorpar.promise import origin_of


def write_weights(
    tensors: Mapping[str, torch.Tensor],
    filename: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write what `safetensors.torch.save_file` would, byte for byte.

    Args:
        tensors: by name; promises, whose origins are called for the values in the order in which
            these lie in the file; one is called while what the one before returned is written,
            so two memories in turn will do. Tensors that are there already go to safetensors' own
            function.
        filename: the file; overwritten.
        metadata: for its header.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    if any(origin_of(tensor) is None for tensor in tensors.values()):
        save_file(dict(tensors), filename, metadata=None if metadata is None else dict(metadata))
        return
    specs = {name: TensorSpec(x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    start = encode(specs, metadata or {})
    with Path(filename).open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
        handle, offset = file.fileno(), len(start)
        reserve(handle, offset + sum(spec.num_bytes for spec in specs.values()))
        written = writer.submit(_put, handle, memoryview(start), 0)
        for name in in_file_order(specs):
            values = bytes_of(origin_of(tensors[name])())
            written.result()
            written = writer.submit(_put, handle, values, offset)
            offset += len(values)
        written.result()


def _put(handle: int, memory: memoryview, offset: int) -> None:
    write_from(handle, memory, offset)
    start_writing(handle, offset, len(memory))
