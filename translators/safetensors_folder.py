"""A Hugging Face folder's weights: shapes at once, values only where they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from tensorpar.files.reading import open_sources

#: a tensor on disk (`tensorpar.files.reading.Source`), or in memory after a user's translation.
Source = Any

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def opened_folder(path: str | PathLike[str]) -> Iterator[dict[str, Source]]:
    """Within: every key of a folder, or of one file, with a handle that reads slices of it.

    Args:
        path: a folder with `model.safetensors` or an index of many files, or such a file itself.

    Raises:
        ValueError: there is no such file, one of the index is missing, or one is truncated.
    """
    with ExitStack() as stack:
        yield open_sources(stack, weight_files(Path(path)))


def shape_of(source: Source) -> tuple[int, ...]:
    """The shape of a tensor, on disk or in memory; nothing is read."""
    return tuple(source.shape)


def weight_files(path: Path) -> list[Path]:
    """The files of a folder of Hugging Face's, of an index, or the one file itself.

    Raises:
        ValueError: there is no such file.
    """
    if path.is_file():
        return _indexed(path) if path.suffix == ".json" else [path]
    if (path / _ONE).is_file():
        return [path / _ONE]
    if (path / _INDEX).is_file():
        return _indexed(path / _INDEX)
    raise ValueError(
        f"path = {str(path)!r}, required: a folder with {_ONE} or {_INDEX}; other formats are "
        "rewritten by Transformers: from_pretrained, then save_pretrained"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from None
    if strange := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names {strange}, required: files of its own folder")
    return [index.parent / name for name in names]
