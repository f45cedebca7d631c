"""One checkpoint to another, from plan to rename."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from tqdm import tqdm

from tensorpar.files.sharded_format import is_file_name
from tensorpar.files.whole_folder import whole_folder
from tensorpar.recognition import LayoutName

from .assembly import Target, Tensor, tensors_of
from .checkpoint import Checkpoint, opened_checkpoint
from .comparing import Measure, differences, equal
from .destination import planned
from .layouts import num_heads
from .rank_files import is_partial_name
from .shards import check_degree
from .stream import write
from .table import Table, table_of

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".index.json", ".gguf")
#: beyond this a file is not one of those that go along with a model's weights.
_SMALL_BYTES = 64 << 20


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        layout: its name.
        degree: of tensor parallelism; None for the layout's own default.
        dtype: of floating-point tensors; None keeps theirs.
        max_shard_size: of a Hugging Face file, in bytes.
    """

    layout: LayoutName
    degree: int | None = None
    dtype: torch.dtype | None = None
    max_shard_size: int | None = None


def convert(source: Checkpoint, path: Path, wanted: Wanted, *, verify: bool = False) -> str:
    """Write an open checkpoint in another layout, degree or dtype; what was done, in a line.

    Args:
        source: where it comes from.
        path: a new or empty folder, which appears when all is written and synced.
        wanted: what is written.
        verify: read it again before it appears, and compare.

    Raises:
        ValueError: keys or shapes that do not fit; files that differ where they must not; another
            degree than the layout can have; a folder that exists. Nothing is written.
        OSError: the disk is full. Nothing is left.
    """
    target = target_of(source, wanted)
    tensors = _tied_once(tensors_of(source), source)
    destination = planned(
        tensors,
        target,
        dtype=wanted.dtype,
        max_shard_size=wanted.max_shard_size,
        config=_config(source, wanted),
    )
    with whole_folder(path.absolute()) as aside:
        _copy_small(source, wanted, aside)
        total = destination.num_bytes
        with _bar(total, "writing") as bar:
            write(tensors, destination, aside, _locked(bar.update))
        if verify:
            _verify(source, tensors, aside, wanted)
    num_files = len(destination.files)
    return (
        f"{source.family or 'a model'}: {source.layout} of degree {len(source.ranks)} to "
        f"{wanted.layout} of degree {target.degree or 1}, {len(tensors)} tensors, {total:,} bytes "
        f"in {num_files} file{'s' if num_files > 1 else ''} at {path}"
    )


def target_of(source: Checkpoint, wanted: Wanted) -> Target:
    """The layout and degree to write, for this model.

    Raises:
        ValueError: the layout cannot have this degree, or what it needs to know is not known.
    """
    if wanted.degree is not None:
        check_degree(wanted.degree)
    if wanted.layout == "hf":
        if wanted.degree not in (None, 1):
            raise ValueError(f"--tp {wanted.degree} with --to hf, required: none")
        return Target("hf")
    if source.family is None:
        _ = source.table  # raises, saying what is needed
    assert source.family is not None
    table = table_of(source.family)
    if wanted.layout == "smdistributed" and wanted.degree is None:
        return Target("smdistributed", None, table)
    if source.config is None:
        raise ValueError(
            f"{source.path} has no config.json, required: one, for the number of heads; name it by "
            "--config"
        )
    return Target(wanted.layout, wanted.degree or 1, table, num_heads(source.config))


def _tied_once(tensors: Sequence[Tensor], source: Checkpoint) -> list[Tensor]:
    """smdistributed writes a tied head twice; as one tensor if both hold the same bits."""
    if source.layout != "smdistributed" or source.family is None:
        return list(tensors)
    kept, copy = table_of(source.family).tied.get("hf", ("", ""))
    by_key = {tensor.key: tensor for tensor in tensors}
    untied = (source.config or {}).get("tie_word_embeddings") is False
    if untied or kept not in by_key or copy not in by_key:
        return list(tensors)
    if not equal(by_key[kept], by_key[copy]):
        return list(tensors)
    aliases = (*by_key[kept].aliases, copy, *by_key[copy].aliases)
    by_key[kept] = replace(by_key[kept], aliases=aliases)
    return [tensor for key, tensor in by_key.items() if key != copy]


def _config(source: Checkpoint, wanted: Wanted) -> Mapping[str, Any] | None:
    """The model's config, with the dtype of what is written."""
    if source.config is None or wanted.dtype is None:
        return source.config
    name = "torch_dtype" if "torch_dtype" in source.config else "dtype"
    return {**source.config, name: str(wanted.dtype).removeprefix("torch.")}


def _copy_small(source: Checkpoint, wanted: Wanted, folder: Path) -> None:
    """The config, the tokenizer, and whatever else lies beside the weights."""
    origin = source.path if source.path.is_dir() else source.path.parent
    if source.path.is_dir():
        for file in sorted(origin.iterdir()):
            if _goes_along(file):
                (folder / file.name).write_bytes(file.read_bytes())
    config = _config(source, wanted)
    if config is not None and (config != source.config or not (folder / "config.json").exists()):
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _goes_along(file: Path) -> bool:
    if not file.is_file() or file.name.startswith(".") or is_file_name(file.name):
        return False
    if is_partial_name(file.name):
        return False
    return not file.name.endswith(_WEIGHTS) and file.stat().st_size <= _SMALL_BYTES


def _verify(source: Checkpoint, tensors: Sequence[Tensor], folder: Path, wanted: Wanted) -> None:
    """Raise ValueError unless what was written is what the source holds."""
    table: Table | None = None if source.family is None else table_of(source.family)
    config, measure = folder / "config.json", Measure(cast=wanted.dtype)
    with (
        opened_checkpoint(
            folder, config=config if config.exists() else None, family=source.family
        ) as written,
        _bar(sum(tensor.spec.num_bytes for tensor in tensors), "verifying") as bar,
    ):
        wrong = list(differences(tensors, tensors_of(written), table, measure, bar.update))
    if wrong:
        raise ValueError(f"what was written is not what was read, and is deleted: {wrong}")


def _locked(update: Callable[[int], object]) -> Callable[[int], None]:
    """A bar is not made for several threads."""
    lock = Lock()

    def locked(count: int) -> None:
        with lock:
            update(count)

    return locked


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, file=sys.stderr)
