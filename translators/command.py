"""`python -m tensorpar.translators`, and these commands of `tensorpar`: checkpoints, on one CPU.

No GPU and no process group is needed, and no more memory than about the largest tensor. What is
written appears whole or not at all.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tensorpar.families import FAMILIES
from tensorpar.recognition import LayoutName

from .assembly import tensors_of
from .checkpoint import opened_checkpoint
from .comparing import Measure, damage, differences
from .converting import Wanted, convert
from .destination import num_bytes
from .inspecting import description
from .table import table_of

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
LAYOUTS: tuple[LayoutName, ...] = ("hf", "tensorpar", "smdistributed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 1 where checkpoints differ or something cannot be done."""
    whole, _ = parser(__doc__)
    return run(whole.parse_args(arguments))


def run(chosen: argparse.Namespace) -> int:
    """Run what was parsed; an error is one line, whatever the command."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _stop)
    try:
        status: int = chosen.run(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return status


def parser(description: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """The command line's grammar, and where more commands can be added."""
    whole = argparse.ArgumentParser(prog="tensorpar", description=description)
    commands = whole.add_subparsers(required=True, metavar="command")
    _add_translate(commands)
    command = commands.add_parser("inspect", help="print layout, degree, tensors, shapes, sizes")
    command.add_argument("path", type=Path, help="a checkpoint of any layout")
    _add_knowledge(command)
    command.set_defaults(run=_inspect)
    command = commands.add_parser(
        "verify",
        help="compare two checkpoints of any two layouts, or one with its own checksums; exits "
        "with 1 where they differ",
    )
    command.add_argument("a", type=Path, help="a checkpoint")
    command.add_argument("b", type=Path, nargs="?", help="another; without it, files are checked")
    command.add_argument(
        "--tolerance", type=float, help="the largest difference that is none; by default bitwise"
    )
    _add_knowledge(command)
    command.set_defaults(run=_verify)
    return whole, commands


def _add_translate(commands: Any) -> None:
    command = commands.add_parser(
        "translate", help="write a checkpoint in another layout, degree or dtype"
    )
    command.add_argument(
        "src",
        type=Path,
        help="a folder of Hugging Face's, of sharded files, of smdistributed's partial files, one "
        "file, or what the names of partial files begin with",
    )
    command.add_argument("dst", type=Path, help="a new folder")
    command.add_argument("--to", choices=LAYOUTS, required=True, help="the layout to write")
    command.add_argument(
        "--tp", type=int, help="tensor-parallel degree to write; smdistributed: one file without it"
    )
    command.add_argument("--dtype", choices=sorted(DTYPES), help="of floating-point tensors")
    command.add_argument(
        "--max-shard-size", default="50GB", help="of a Hugging Face file, e.g. 5GB or 300MiB"
    )
    command.add_argument("--verify", action="store_true", help="read what was written, compare")
    _add_knowledge(command)
    command.set_defaults(run=_translate)


def _add_knowledge(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, help="the model's config.json or its folder, where there is none"
    )
    command.add_argument("--family", choices=sorted(FAMILIES), help="by default recognised")


def _translate(chosen: argparse.Namespace) -> int:
    wanted = Wanted(
        chosen.to,
        chosen.tp,
        None if chosen.dtype is None else DTYPES[chosen.dtype],
        num_bytes(chosen.max_shard_size),
    )
    with _opened(chosen.src, chosen) as source:
        print(convert(source, chosen.dst, wanted, verify=chosen.verify))
    return 0


def _inspect(chosen: argparse.Namespace) -> int:
    with _opened(chosen.path, chosen) as checkpoint:
        for line in description(checkpoint):
            print(line)
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    num_wrong = 0
    for line in _wrong(chosen):
        print(line)
        num_wrong += 1
    print("different" if num_wrong else "the same" if chosen.b else "intact")
    return int(num_wrong > 0)


def _wrong(chosen: argparse.Namespace) -> Any:
    with ExitStack() as stack:
        a = stack.enter_context(_opened(chosen.a, chosen))
        if a.headers:
            yield from damage(chosen.a if chosen.a.is_dir() else chosen.a.parent)
        if chosen.b is None:
            return
        b = stack.enter_context(_opened(chosen.b, chosen))
        family = a.family or b.family
        left, right = tensors_of(a), tensors_of(b)
        total = sum(tensor.spec.num_bytes for tensor in left)
        bar = stack.enter_context(
            tqdm(total=total, desc="comparing", unit="B", unit_scale=True, file=sys.stderr)
        )
        table = None if family is None else table_of(family)
        yield from differences(left, right, table, Measure(chosen.tolerance), bar.update)


def _opened(path: Path, chosen: argparse.Namespace) -> Any:
    """One of two checkpoints may have the config that the other lacks."""
    return opened_checkpoint(path, config=chosen.config, family=chosen.family)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
