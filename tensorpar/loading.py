"""`from_pretrained` under tensor parallelism: Transformers finds the tensors, ranks read slices.

Transformers loads promises in place of tensors: it resolves files, renames keys, ties, reports
what is missing and initialises that, all as ever. When its model is cut, each promise is kept by
reading this rank's slice of the file; nothing that is sharded is ever whole. On CPUs a slice that
the file has in one piece stays where it is, mapped, as Transformers' own weights do.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from tensorpar import hf_compat
from tensorpar.agreement import checksum
from tensorpar.files.reading import Source, open_sources, with_own_storage
from tensorpar.paging import empty_in_large_pages, will_be_read
from tensorpar.promise import Promise, origin_of
from tensorpar.styles import Layout

#: the fact by which ranks tell each other whether their loading went well.
LOADED = "loading"
#: of a shard: where in it, and what is there.
Parts = list[tuple[tuple[Any, ...], torch.Tensor]]
#: how many rows are compared at once where two tensors must be.
_ROWS = 1024


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """`torch.equal` of promises, a few rows at a time."""
    sources = origin_of(one), origin_of(other)
    if one.shape != other.shape or None in sources:
        return False
    if sources[0].is_same_as(sources[1]):
        return True
    if not one.ndim:
        return torch.equal(*(source[...] for source in sources))
    return all(
        torch.equal(*(source[start : start + _ROWS] for source in sources))
        for start in range(0, one.shape[0], _ROWS)
    )


class InFile(Promise):
    """A promise of a tensor on disk. It passes for a CPU tensor, as one that was loaded would."""

    answers = {
        torch.Tensor.device.__get__: lambda _: torch.device("cpu"),
        torch.Tensor.data_ptr: lambda promise: id(promise.origin),
        torch.equal: _equal,
    }


def promises(files: Sequence[str], *, may_map: bool = True) -> dict[str, Any]:
    """A promise for every tensor of checkpoint files, by its key; no value is read.

    Args:
        files: of safetensors, or of torch's pickles, which are mapped, not read.
        may_map: whether a model may keep parts of the mapped files as its weights.

    Raises:
        ValueError: a file that is missing, truncated, or holds more than weights.
    """
    if files[0].endswith(".safetensors"):
        # the files stay mapped for as long as a promise is left
        sources = open_sources(ExitStack(), files, last=may_map)
        return {
            key: InFile.of(source, source.shape, source.dtype) for key, source in sources.items()
        }
    found: dict[str, Any] = {}
    for file in files:
        found |= {key: _promise(key, value, file) for key, value in _unpickled(file).items()}
    return found


def _promise(key: str, value: Any, file: str) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return InFile.of(Source(value, f"{key} in {file}"), value.shape, value.dtype)


def _unpickled(file: str) -> dict[str, Any]:
    try:
        return hf_compat.read_pickled(file)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as weights only ({str(error).splitlines()[0]}), required: "
            "safetensors, or a pickle of tensors and nothing else; if you trust the file, rewrite "
            "it outside tensor_parallelism(): torch.load(..., weights_only=False), then "
            "safetensors.torch.save_file"
        ) from None


class Keeper:
    """Keeps the promises of one model: this rank's part of each, on its device.

    Args:
        model: the model, on all ranks the same.
        mesh: the tp mesh.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        number = sum(origin_of(tensor) is not None for tensor in model.parameters())
        quiet = dist.get_rank() > 0 or not hf_compat.shows_progress() or not number
        self._bar = tqdm(total=number, desc="Loading weights", unit="tensor", disable=quiet)

    def shard(
        self, promise: torch.Tensor, shape: torch.Size, layout: Layout | None
    ) -> torch.Tensor:
        """This rank's part of a promised parameter, read now.

        Args:
            promise: the parameter in Hugging Face's layout.
            shape: its whole shape in tensorpar layout.
            layout: the way there; None where it stays as it is and whole.

        Returns:
            In the dtype of the promise.

        Raises:
            ValueError: Transformers has given the parameter another shape than the file has.
        """
        from tensorpar.translators.slices import read_parts, shard_shape

        source = origin_of(promise)
        if source.shape != tuple(promise.shape):
            raise ValueError(
                f"{source} has shape {source.shape}, required: {tuple(promise.shape)}; load it "
                "outside tensor_parallelism(), save_pretrained, and load that"
            )
        ranks = self.mesh.size(), self.mesh.get_local_rank()
        if layout is None:
            parts: Parts = [((...,), source[...])]
        else:
            parts = list(read_parts(source, layout, shape, *ranks))
            shape = shard_shape(layout, shape, *ranks)
        for _, values in parts:
            will_be_read(values)
        own = self._mapped(source, parts, promise.dtype)
        if own is None:
            own = self._copied(parts, shape, promise.dtype)
        self._bar.update()
        return own.requires_grad_(promise.requires_grad)

    def _mapped(self, source: Source, parts: Parts, dtype: torch.dtype) -> torch.Tensor | None:
        """The shard where the file has it, if it has it as one piece.

        Nothing is copied, as in Transformers: the pages are the file's, those that are written to
        become this process's own, and the file stays as it is.
        """
        if self.mesh.device_type != "cpu" or not source.lasts or len(parts) != 1:
            return None
        _, values = parts[0]
        return with_own_storage(values) if values.dtype == dtype else None

    @torch.no_grad()
    def _copied(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if self.mesh.device_type == "cpu":
            own = empty_in_large_pages(shape, dtype)
        else:
            own = torch.empty(shape, dtype=dtype, device=self.mesh.device_type)
        for place, values in parts:
            own[place].copy_(values)
        return own

    def close(self) -> None:
        """All promises are kept."""
        self._bar.close()


def fact(promise: torch.Tensor) -> str:
    """By what ranks compare the files they are about to read."""
    return f"crc {checksum(origin_of(promise).sample()):08x}"
