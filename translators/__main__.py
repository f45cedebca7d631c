"""`python -m tensorpar.translators`: checkpoints on disk from one layout to another, on one CPU."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from tensorpar.families import FAMILIES

from .problems import refuse
from .rank_files import read
from .smdistributed import is_smdistributed, match
from .table import Table, table_of, tables
from .tensors import StateDict
from .translate import translate_to_hf, variant

_NAME = "model.safetensors"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line; exits with a one-line error and status 1 where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tensorpar.translators", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "smdistributed-to-hf",
        help="merge and translate smdistributed's files, of any tensor- and pipeline-parallel "
        f"degree, to Hugging Face's {_NAME}",
    )
    command.add_argument(
        "files", nargs="+", type=Path, help="a folder, a full file, or all <file>_{pp}_{tp}.pt"
    )
    command.add_argument("out", type=Path, help=f"a folder, or a file named *.safetensors: {_NAME}")
    command.add_argument("--family", choices=sorted(FAMILIES), help="by default recognised")
    chosen = parser.parse_args(arguments)
    try:
        out = destination(chosen.out)
        told = smdistributed_to_hf(chosen.files, out, chosen.family)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(told)


def smdistributed_to_hf(files: Sequence[Path], out: Path, family: str | None = None) -> str:
    """Merge and translate files; returns what was done, in a line.

    Args:
        files: a folder, a full file, or all partial files of a checkpoint.
        out: the file to write, which must not exist.
        family: Transformers' `model_type`; by default recognised by the keys.

    Raises:
        ValueError: whatever keeps the files from being one checkpoint; nothing is written then.
    """
    dicts = read(files)
    table = recognised(dicts) if family is None else table_of(family)
    if not is_smdistributed(dicts[0]):
        raise ValueError(f"keys = {list(dicts[0])[:3]}..., required: smdistributed's layout")
    hf = translate_to_hf(table, dicts)
    write(hf, out)
    return f"{table.family}: tensor-parallel degree {len(dicts)}, {len(hf)} tensors in {out}"


def destination(out: Path) -> Path:
    """The file that is written for `out`; raises ValueError if it exists."""
    file = out if out.suffix == ".safetensors" and not out.is_dir() else out / _NAME
    if file.exists():
        raise ValueError(f"{file} exists, required: a new file; move it away first")
    return file


def recognised(dicts: Sequence[StateDict]) -> Table:
    """The table of the only family whose keys these are."""
    keys = list(dict.fromkeys(key for part in dicts for key in part))
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
    return fitting[0]


def write(tensors: StateDict, file: Path) -> None:
    """Write a safetensors file whole or not at all; missing folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(_apart(tensors), temporary, metadata={"format": "pt"})
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _apart(tensors: StateDict) -> StateDict:
    """Contiguous tensors without common memory, which the format refuses."""
    apart: StateDict = {}
    taken = set()
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        memory = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if memory in taken else own
        taken.add(memory)
    return apart


if __name__ == "__main__":
    main()
