"""A parallel model to one file per tensor-parallel rank, and from such files at any other degree.

Every rank writes its own shards and reads only the bytes of its own, so nothing is gathered and no
rank holds more than one tensor beside the model.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tensorpar.files.positioned import bytes_of, write_from
from tensorpar.files.safetensors_header import decode
from tensorpar.files.sharded_format import (
    RankHeader,
    digest,
    file_name,
    header_bytes,
    is_file_name,
    slice_of,
)
from tensorpar.files.sharded_reading import Box, ShardedFiles, box_of, damaged, opened_sharded
from tensorpar.files.whole_folder import commit, discard, make_aside
from tensorpar.gathering import TIMEOUT
from tensorpar.mesh import tp_mesh
from tensorpar.model import DistributedModel
from tensorpar.parameters import local_shard, shard_dim
from tensorpar.ranks import rdp_rank
from tensorpar.rendezvous import rendezvous
from tensorpar.together import on_all_ranks


def save_sharded(
    model: nn.Module, path: str | os.PathLike[str], *, timeout: timedelta = TIMEOUT
) -> None:
    """Write one safetensors file per tensor-parallel rank; collective over all ranks.

    The folder appears when all is written and synced; a save that is killed leaves what was there.
    Models under `fully_shard` are gathered over their data-parallel ranks, a tensor at a time.

    Args:
        model: a parallel model, or a `DistributedModel` of one; in tensorpar layout.
        path: a folder that all ranks can reach; new, empty, or an earlier save, which is replaced.
        timeout: how long to wait for the last rank to call this.

    Raises:
        TimeoutError: a rank does not make this call in time; on all ranks that do.
        ValueError: `path` holds other files. On every rank.
        OSError: a rank cannot write, for example because the disk is full. On every rank.
    """
    rank = rendezvous("save_sharded", timeout)
    folder = Path(path).absolute()
    asides = on_all_ranks("save_sharded", lambda: _begin(folder) if rank == 0 else "")
    save = _Save(Path(asides[0]), _content(model))
    try:
        on_all_ranks("save_sharded", save.begin)
        for name in save.content.tensors:
            save.write(name)
        written = on_all_ranks("save_sharded", save.checksums)
        by_rank = dict(one for one in written if one)
        checkpoint = digest([by_rank[tp] for tp in sorted(by_rank)])
        on_all_ranks("save_sharded", lambda: save.finish(checkpoint))
        on_all_ranks("save_sharded", lambda: commit(save.aside, folder) if rank == 0 else None)
    finally:
        save.close()
        if rank == 0:
            discard(save.aside)


def load_sharded(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    verify: bool = False,
    timeout: timedelta = TIMEOUT,
) -> None:
    """Fill a parallel model from files of `save_sharded`, of any degree; collective.

    Every rank reads the bytes of its own shards and of replicated parameters, nothing else.

    Args:
        model: made parallel, or a `DistributedModel`; all its weights are overwritten, in its own
            dtypes.
        path: the folder.
        verify: read all files first, shared among the ranks, and compare with their checksums.
        timeout: how long to wait for the last rank to call this.

    Raises:
        TimeoutError: a rank does not make this call in time; on all ranks that do.
        ValueError: files that are missing, altered or of different saves; all keys that are
            missing, unknown or of the wrong shape. On every rank, and the model is unchanged.
        OSError: a rank cannot read. On every rank.
    """
    rendezvous("load_sharded", timeout)
    if isinstance(model, DistributedModel):
        model = model.get_module()

    def check() -> None:
        with opened_sharded(Path(path)) as files:
            _check(model, files)
            if verify:
                _verify(files)

    def fill() -> None:
        targets = _targets(model)
        with opened_sharded(Path(path)) as files:
            for first, name in _chosen(targets, files).items():
                _fill(targets[first][1], str(name), files)

    on_all_ranks("load_sharded", check)
    on_all_ranks("load_sharded", fill)


def _begin(folder: Path) -> str:
    """A folder aside; raises ValueError if something else than an earlier save is in the way."""
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"path = {str(folder)!r} is a file, required: a folder")
        others = sorted(p.name for p in folder.iterdir() if not is_file_name(p.name))
        if others:
            raise ValueError(
                f"path = {str(folder)!r} holds {others[:5]}, required: a new or empty folder, or "
                "an earlier save, which is replaced as a whole"
            )
    return str(make_aside(folder.absolute()))


@dataclass(frozen=True)
class _Content:
    """A model's tensors, each once, and the header of this rank's file."""

    tensors: Mapping[str, torch.Tensor]
    header: RankHeader


def _content(model: nn.Module) -> _Content:
    if isinstance(model, DistributedModel):
        model = model.get_module()
    first: dict[int, str] = {}
    tensors, ties = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept == name:
            tensors[name] = tensor
        else:
            ties[name] = kept
    mesh = tp_mesh()
    rank, degree = mesh.get_local_rank(), mesh.size()
    slices = {n: slice_of(x.shape, shard_dim(x), degree, rank) for n, x in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    config = getattr(model, "config", None)
    told = json.loads(config.to_json_string(use_diff=False)) if config is not None else None
    return _Content(tensors, RankHeader(rank, degree, slices, dtypes, ties, told))


def _part(tensor: torch.Tensor) -> torch.Tensor:
    """This tensor-parallel rank's part, on the CPU; collective if data parallelism shards it."""
    if isinstance(tensor, DTensor):
        if tensor.device_mesh.ndim == 1:
            tensor = tensor.to_local()
        else:
            tensor = local_shard(tensor.full_tensor(), tp_mesh(), shard_dim(tensor))
    return tensor.detach().cpu().contiguous()


class _Save:
    """This rank's part in a save: its file, if it writes one.

    Args:
        aside: the folder that is being written.
        content: of the model.
    """

    def __init__(self, aside: Path, content: _Content) -> None:
        self.aside, self.content = aside, content
        self._handle: int | None = None
        self._offsets: Mapping[str, int] = {}
        self._crcs: dict[str, int] = {}
        self._error: OSError | None = None

    def begin(self) -> None:
        """Create the file, on one of the ranks that hold the same shard."""
        header = self.content.header
        start = header_bytes(header)
        size = len(start) + sum(spec.num_bytes for spec in header.specs().values())
        self._offsets = decode(start, size).offsets
        if rdp_rank() == 0:
            path = self.aside / file_name(header.rank, header.degree)
            self._handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)

    def write(self, name: str) -> None:
        """Put a tensor in its place; an error is kept, since others may still be gathering."""
        part = _part(self.content.tensors[name])
        if self._handle is not None and self._error is None:
            memory = bytes_of(part)
            self._crcs[name] = zlib.crc32(memory)
            try:
                write_from(self._handle, memory, self._offsets[name])
            except OSError as error:
                self._error = error

    def checksums(self) -> tuple[int, dict[str, int]] | None:
        """The rank of tensor parallelism, and CRC-32 by name; raises what went wrong."""
        if self._error is not None:
            raise self._error
        return None if self._handle is None else (self.content.header.rank, self._crcs)

    def finish(self, checkpoint: str) -> None:
        """Write the header, and wait until all is on the disk."""
        if self._handle is not None:
            start = header_bytes(self.content.header.with_checksums(self._crcs, checkpoint))
            write_from(self._handle, memoryview(start), 0)
            os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)


def _targets(model: nn.Module) -> dict[str, tuple[list[str], torch.Tensor]]:
    """By its first name, each tensor of the model once, with all its names."""
    by_identity: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), ([], tensor))[0].append(name)
    return {names[0]: (names, tensor) for names, tensor in by_identity.values()}


def _chosen(
    targets: Mapping[str, tuple[list[str], torch.Tensor]], files: ShardedFiles
) -> dict[str, str | None]:
    """By a target's first name, the name under which the files keep it, if they do."""
    header = files.headers[0]
    kept = {name: name for name in header.slices} | dict(header.ties)
    return {
        first: next((kept[name] for name in names if name in kept), None)
        for first, (names, _) in targets.items()
    }


def _check(model: nn.Module, files: ShardedFiles) -> None:
    """Raise ValueError listing everything by which files and model do not fit."""
    targets = _targets(model)
    chosen = _chosen(targets, files)
    slices = files.headers[0].slices
    problems = []
    for first, (_, tensor) in targets.items():
        name, shape = chosen[first], tuple(tensor.shape)
        if name is None:
            problems.append(f"{first} {shape} is missing")
        elif slices[name].shape != shape:
            problems.append(f"{name} has shape {slices[name].shape}, required {shape}")
        if isinstance(tensor, DTensor) and tensor.device_mesh.ndim > 1:
            names = tensor.device_mesh.mesh_dim_names
            problems.append(f"{first} is sharded over {names}; load before fully_shard")
    unknown = slices.keys() - set(chosen.values())
    problems += [f"{name} {slices[name].shape} is unknown" for name in slices if name in unknown]
    if problems:
        raise ValueError(
            f"the files do not fit the {type(model).__name__}, {len(problems)} problems: "
            + "; ".join(problems)
        )


def _verify(files: ShardedFiles) -> None:
    """Raise ValueError naming tensors that were altered, in the files that are this rank's turn."""
    world = dist.get_world_size()
    for rank in range(dist.get_rank(), len(files.headers), world):
        if wrong := damaged(files, rank):
            name = file_name(rank, len(files.headers))
            raise ValueError(f"{name} is damaged: {wrong} are not what was saved; copy it again")


@torch.no_grad()
def _fill(tensor: torch.Tensor, name: str, files: ShardedFiles) -> None:
    preferred = tp_mesh().get_local_rank()
    box: Box = tuple((0, size) for size in tensor.shape)
    local = tensor
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        rank, degree = mesh.get_local_rank(), mesh.size()
        box = box_of(slice_of(tensor.shape, shard_dim(tensor), degree, rank))
        local = tensor.to_local()
    local.copy_(files.read(name, box, preferred))
