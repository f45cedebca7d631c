"""smdistributed's files on disk: one per pipeline and tensor-parallel rank, or one for all."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .problems import refuse
from .tensors import StateDict, opened

#: what a full file is called where we write one.
FULL_NAME = "model.pt"
_NAME = re.compile(r"(?P<stem>.+)_(?P<pp>\d+)_(?P<tp>\d+)(?:\.pt)?")


class RankFile(NamedTuple):
    """A partial file: `{stem}_{pp}_{tp}.pt`."""

    stem: str
    pp: int
    tp: int
    path: Path


def is_partial_name(name: str) -> bool:
    """Whether a file of this name is one rank's."""
    return _NAME.fullmatch(name) is not None


def partial_files(path: Path) -> list[list[Path]]:
    """The files of a checkpoint by tensor-parallel rank, each with those of all pipeline ranks.

    Args:
        path: a folder, or what the names of partial files begin with. In a folder, files named
            `model` come before others, such as the optimizer's.

    Returns:
        An empty list if there are no such files.

    Raises:
        ValueError: files of several checkpoints; a rank that is missing.
    """
    folder = path if path.is_dir() else path.parent
    stems: dict[str, list[RankFile]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _NAME.fullmatch(file.name)
        if found and file.is_file():
            rank = RankFile(found["stem"], int(found["pp"]), int(found["tp"]), file)
            stems.setdefault(rank.stem, []).append(rank)
    wanted = "model" if folder == path else path.name
    if wanted in stems:
        return _by_rank(stems[wanted])
    if folder != path or not stems:
        return []
    if len(stems) > 1:
        raise ValueError(
            f"{folder} has files of several checkpoints, {sorted(stems)}, required: one; name it: "
            f"{folder / sorted(stems)[0]}"
        )
    return _by_rank(next(iter(stems.values())))


def _by_rank(ranks: Sequence[RankFile]) -> list[list[Path]]:
    """Every rank up to the highest of both kinds must be there, once."""
    held = {(rank.pp, rank.tp): rank.path for rank in ranks}
    num_pp, num_tp = (max(numbers) + 1 for numbers in zip(*held, strict=True))
    needed = {(pp, tp) for pp in range(num_pp) for tp in range(num_tp)}
    problems = [f"no file for pp {pp}, tp {tp}" for pp, tp in sorted(needed - held.keys())]
    names = [rank.path.name for rank in ranks]
    if len(names) > len(held):
        problems.append(f"several files for one rank among {names}")
    refuse("the files are not all ranks' of one checkpoint", problems)
    return [[held[pp, tp] for pp in range(num_pp)] for tp in range(num_tp)]


def load(path: Path) -> StateDict:
    """The tensors of a file that `torch.save` wrote; their values are read when they are used.

    Raises:
        ValueError: a file that is truncated, no state dict, or that holds more than tensors, which
            to read could run code.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are read whole
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        told = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} holds more than tensors and is not read: that could run code: {told}"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read, is it whole? {error!r}") from None
    try:
        tensors, _ = opened(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tensors
