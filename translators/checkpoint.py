"""Any checkpoint on disk, of whichever layout and degree: its tensors, unread, and what is known.

The layout is recognised by the files' names, the keys and the number of dims; the family by the
config or, where there is none, by the keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tensorpar.families import FAMILIES
from tensorpar.files.safetensors_header import TensorSpec, read_header
from tensorpar.files.sharded_format import RankHeader, file_name, is_file_name, read_checkpoint
from tensorpar.recognition import LayoutName

from .layouts import Layouts
from .problems import refuse
from .rank_files import FULL_NAME, load, partial_files
from .safetensors_folder import weight_files
from .slices import hf_shape
from .smdistributed import is_smdistributed, match
from .stored import InFile, InMemory, Stored
from .table import Table, table_of, tables
from .tensors import StateDict
from .translate import variant

#: what a torch.save'd folder of Hugging Face's is called.
_TORCH_ONE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_CONFIG = "config.json"

#: a rank's tensors by key; several where pipeline ranks hold copies.
Keys = dict[str, tuple[Stored, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: as it was given.
        layout: of its keys and axes.
        ranks: what each tensor-parallel rank holds; one that holds all if it is not partial.
        partial: whether tensors are slices.
        config: the model's, if it is known.
        family: Transformers' `model_type`, if it is one that has a table.
        headers: of sharded files; empty for other formats.
    """

    path: Path
    layout: LayoutName
    ranks: list[Keys]
    partial: bool
    config: Mapping[str, Any] | None
    family: str | None
    headers: Sequence[RankHeader] = field(default_factory=list)

    @property
    def table(self) -> Table:
        """The family's table, or its variant that the keys are of.

        Raises:
            ValueError: the family is not known.
        """
        if self.family is None:
            raise ValueError(
                f"{self.path} is of no known family, required: one of {sorted(FAMILIES)}; name it "
                "by --family, or give the model's config by --config"
            )
        table = table_of(self.family)
        return variant(table, self.ranks[0]) if self.layout == "smdistributed" else table

    def shapes(self) -> list[StateDict]:
        """What each rank holds, as tensors on the meta device."""
        return [{key: meta(copies[0].spec) for key, copies in one.items()} for one in self.ranks]


def meta(spec: TensorSpec) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


@contextmanager
def opened_checkpoint(
    path: Path, *, config: Path | None = None, family: str | None = None
) -> Iterator[Checkpoint]:
    """Within: a checkpoint whose tensors can be read; no value is read to open it.

    Args:
        path: a folder of Hugging Face's, of sharded files or of smdistributed's partial files, one
            file, or what the names of partial files begin with.
        config: the model's, or a folder with it, where `path` has none.
        family: Transformers' `model_type`, where neither config nor keys tell it.

    Raises:
        ValueError: files that are missing, truncated, altered or not of one checkpoint; keys that
            fit no family, or several.
    """
    with ExitStack() as stack:
        headers: list[RankHeader] = []
        partial = False
        if _is_sharded(path):
            folder = path if path.is_dir() else path.parent
            headers, partial = read_checkpoint(folder), True
            ranks = [_sharded(folder, header, stack) for header in headers]
        elif by_rank := partial_files(path):
            partial = True
            ranks = [_of_pipeline(files) for files in by_rank]
        else:
            ranks = [_of_files(path, stack)]
        told = _config(path, config) or (headers[0].config if headers else None)
        layout, known = _recognised(ranks, told, family, sharded=bool(headers))
        yield Checkpoint(path, layout, ranks, partial, told, known, headers)


def _is_sharded(path: Path) -> bool:
    if path.is_dir():
        return any(is_file_name(file.name) for file in path.iterdir())
    return path.is_file() and is_file_name(path.name)


def _sharded(folder: Path, header: RankHeader, stack: ExitStack) -> Keys:
    path = folder / file_name(header.rank, header.degree)
    handle = stack.enter_context(path.open("rb")).fileno()
    assert header.offsets is not None
    keys: Keys = {
        name: (InFile(spec, path, handle, header.offsets[name]),)
        for name, spec in header.specs().items()
    }
    return keys | {name: keys[kept] for name, kept in header.ties.items()}


def _of_pipeline(files: Iterable[Path]) -> Keys:
    keys: Keys = {}
    for file in files:
        for key, stored in _of_torch(file).items():
            keys[key] = (*keys.get(key, ()), stored)
    return keys


def _of_files(path: Path, stack: ExitStack) -> Keys:
    keys: Keys = {}
    for file in _files(path):
        found = _of_safetensors(file, stack) if file.suffix == ".safetensors" else _of_torch(file)
        if twice := sorted(keys.keys() & found.keys()):
            raise ValueError(f"{file} holds {twice[:5]}, as another file does; required: once")
        keys |= {key: (stored,) for key, stored in found.items()}
    return keys


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"path = {str(path)!r} is absent, required: a checkpoint")
    if path.is_dir() and not list(path.glob("model*.safetensors*")):
        if (path / _TORCH_INDEX).is_file():
            return weight_files(path / _TORCH_INDEX)
        for name in (_TORCH_ONE, FULL_NAME):
            if (path / name).is_file():
                return [path / name]
        raise ValueError(
            f"{path} holds no checkpoint, required: model.safetensors or its index, sharded files "
            f"named {file_name(0, 1)}, smdistributed's partial files model_{{pp}}_{{tp}}.pt, "
            f"{FULL_NAME} or {_TORCH_ONE}; or name the file"
        )
    return weight_files(path)


def _of_safetensors(file: Path, stack: ExitStack) -> dict[str, Stored]:
    header = read_header(file)
    handle = stack.enter_context(file.open("rb")).fileno()
    return {
        name: InFile(spec, file, handle, header.offsets[name])
        for name, spec in header.tensors.items()
    }


def _of_torch(file: Path) -> dict[str, Stored]:
    """Tensors that share all their memory are one, under several names."""
    distinct: dict[tuple[Any, ...], Stored] = {}
    keys: dict[str, Stored] = {}
    for key, tensor in load(file).items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.numel())
        name: Any = place if tensor.numel() else key
        keys[key] = distinct.setdefault((name,), InMemory(tensor))
    return keys


def _config(path: Path, given: Path | None) -> Mapping[str, Any] | None:
    if given is not None:
        file = given / _CONFIG if given.is_dir() else given
    else:
        file = (path if path.is_dir() else path.parent) / _CONFIG
        if not file.is_file():
            return None
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no config of a model: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no config of a model: a {type(config).__name__}")  # noqa: TRY004
    return config


def _recognised(
    ranks: Sequence[Keys], config: Mapping[str, Any] | None, family: str | None, *, sharded: bool
) -> tuple[LayoutName, str | None]:
    known = family or (config or {}).get("model_type")
    known = known if known in FAMILIES else None
    if is_smdistributed(ranks[0]):
        return "smdistributed", known or _family_by_keys(ranks)
    if sharded or (known is not None and _taken_apart(ranks[0], Layouts(known))):
        return "tensorpar", known
    if len(ranks) > 1:
        _family_by_keys(ranks)  # raises, naming what does not fit
    return "hf", known


def _taken_apart(keys: Keys, layouts: Layouts) -> bool:
    """Whether a tensor has the number of dims that tensorpar's layout alone has."""
    for key, copies in keys.items():
        if (entry := layouts.find(key)) is not None:
            num_dims = len(entry.layout.pattern.right_axes)
            if num_dims != len(hf_shape(entry.layout, torch.Size([1] * num_dims))):
                return len(copies[0].spec.shape) == num_dims
    return False


def _family_by_keys(ranks: Sequence[Keys]) -> str:
    """The only family whose keys these are, in smdistributed's layout."""
    keys = list(dict.fromkeys(key for part in ranks for key in part))
    found = []
    for table in tables():
        own = variant(table, keys).fitting(keys, "smd")
        matched = match(own, keys, "smd")
        num_known = len({key for one in matched.rules for key in one.smd}.intersection(keys))
        found.append((table, matched.problems, num_known))
    fitting = [table for table, problems, _ in found if not problems]
    if not fitting:
        table, problems, _ = max(found, key=lambda one: (one[2], -len(one[1])))
        refuse(f"the keys fit no family, least badly {table.family}", problems)
    if len(fitting) > 1:
        names = [table.family for table in fitting]
        raise ValueError(f"the keys fit {names}, required: one family; name it by --family")
    return fitting[0].family
