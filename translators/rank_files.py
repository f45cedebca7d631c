"""smdistributed's files on disk: one per pipeline and tensor-parallel rank, or one for all."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .partial import union
from .problems import refuse
from .tensors import StateDict, opened

_NAME = re.compile(r"(?P<stem>.+)_(?P<pp>\d+)_(?P<tp>\d+)(?:\.pt)?")


class RankFile(NamedTuple):
    """A partial file: `{stem}_{pp}_{tp}.pt`."""

    stem: str
    pp: int
    tp: int
    path: Path


def read(paths: Iterable[Path]) -> list[StateDict]:
    """The dicts of all tensor-parallel ranks, or one full dict.

    Args:
        paths: a folder, a full file, or all partial files of one checkpoint.

    Raises:
        ValueError: a file that is absent, unsafe to read or no state dict; ranks that are missing.
    """
    files = _listed(list(paths))
    if len(files) == 1:
        return [_load(files[0])]
    ranks = _ranks(files)
    by_tp: dict[int, list[StateDict]] = {}
    for rank in sorted(ranks):
        by_tp.setdefault(rank.tp, []).append(_load(rank.path))
    return [union(by_tp[tp]) for tp in sorted(by_tp)]


def _listed(paths: list[Path]) -> list[Path]:
    if absent := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"{absent} are absent, required: files, or one folder of them")
    files = []
    for path in paths:
        files += _in_folder(path) if path.is_dir() else [path]
    return files


def _in_folder(folder: Path) -> list[Path]:
    """The folder's partial files; those named `model` before others, such as the optimizer's."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    stems: dict[str, list[Path]] = {}
    for name in names:
        if found := _NAME.fullmatch(name):
            stems.setdefault(found["stem"], []).append(folder / name)
    if "model" in stems:
        return stems["model"]
    if len(stems) != 1:
        raise ValueError(
            f"{folder} has {names}, required: files model_{{pp}}_{{tp}}.pt, or partial files of "
            "one checkpoint only; name the files themselves"
        )
    return next(iter(stems.values()))


def _ranks(files: list[Path]) -> list[RankFile]:
    """What the names tell; every rank up to the highest of both kinds must be there, once."""
    ranks = []
    for path in files:
        if (found := _NAME.fullmatch(path.name)) is None:
            raise ValueError(f"{path} is named otherwise than <file>_{{pp}}_{{tp}}.pt")
        ranks.append(RankFile(found["stem"], int(found["pp"]), int(found["tp"]), path))
    held = [(rank.pp, rank.tp) for rank in ranks]
    num_pp, num_tp = (max(numbers) + 1 for numbers in zip(*held, strict=True))
    needed = {(pp, tp) for pp in range(num_pp) for tp in range(num_tp)}
    problems = [f"no file for pp {pp}, tp {tp}" for pp, tp in sorted(needed - set(held))]
    problems += [f"several files for pp {x[0]}, tp {x[1]}" for x in held if held.count(x) > 1]
    if len(stems := {rank.stem for rank in ranks}) > 1:
        problems.append(f"files of several checkpoints: {sorted(stems)}")
    refuse("the files are not all ranks' of one checkpoint", problems)
    return ranks


def _load(path: Path) -> StateDict:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and is not read: that could run code: {error}"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} cannot be read, is it whole? {error!r}") from None
    try:
        tensors, _ = opened(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return tensors
