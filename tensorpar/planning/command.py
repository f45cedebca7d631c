"""`tensorpar plan`: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

#: degrees that are tried against `--memory`, beside the one that is asked for.
DEGREES = (1, 2, 4, 8, 16)


def add(commands: Any, num_bytes: Callable[[str], int]) -> None:
    """Add the command to a parser's.

    Args:
        commands: what `add_subparsers` returned.
        num_bytes: reads a size such as `24GB`; raises ValueError for what is none.
    """
    command = commands.add_parser(
        "plan",
        help="print what a training step will hold, compute and send per rank; nothing is "
        "allocated",
    )
    command.add_argument("model", type=Path, help="a config.json, or a folder that has one")
    command.add_argument("--model-class", help="of Transformers; by default the config's")
    command.add_argument("--tp", type=int, default=1, help="tensor-parallel degree")
    command.add_argument("--dp", type=int, default=1, help="data-parallel copies")
    command.add_argument(
        "--data-parallel",
        default="fsdp",
        choices=("fsdp", "replicate"),
        help="what copies share; by default fsdp",
    )
    command.add_argument("--batch", type=int, default=1, help="rows that each copy is fed")
    command.add_argument(
        "--sequence", type=int, help="tokens in a row; by default all positions of the model"
    )
    command.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64")
    )
    command.add_argument("--optimizer", default="adamw", choices=("adamw", "sgd"))
    command.add_argument("--gradient-checkpointing", action="store_true")
    command.add_argument("--sequence-parallel", action="store_true")
    command.add_argument("--memory", help="of one rank, e.g. 24GB: also print which degrees fit it")
    command.add_argument("--chart", type=Path, metavar="FILE.png", help="draw what a rank holds")
    command.set_defaults(run=lambda chosen: _run(chosen, num_bytes))


def _run(chosen: argparse.Namespace, num_bytes: Callable[[str], int]) -> int:
    memory = None if chosen.memory is None else _memory(chosen.memory, num_bytes)
    if chosen.chart is not None:
        from tensorpar.planning.chart import require_matplotlib

        require_matplotlib()
        if not chosen.chart.parent.is_dir():
            raise ValueError(f"--chart = {str(chosen.chart)!r}, required: in a folder that exists")
    wanted = _wanted(chosen)
    import transformers

    transformers.logging.set_verbosity_error()
    from tensorpar.planning import report, step
    from tensorpar.planning.wanted import described

    print(described(wanted))
    figures = step.planned(wanted)
    print(*report.lines(figures), sep="\n")
    plans = {wanted.tp: figures}
    if memory is not None:
        for degree in DEGREES:
            if degree != wanted.tp:
                plans[degree] = step.planned(replace(wanted, tp=degree))
        plans = dict(sorted(plans.items()))
        print("", *report.degrees(plans, memory), sep="\n")
    if chosen.chart is not None:
        from tensorpar.planning.chart import draw

        title = described(wanted).replace(f", tp {wanted.tp}", "", 1)
        draw(plans, title, memory, chosen.chart)
        print(f"drawn in {chosen.chart}")
    return 0


def _memory(text: str, num_bytes: Callable[[str], int]) -> int:
    try:
        return num_bytes(text)
    except ValueError as error:
        raise ValueError(f"--memory: {error}") from None


def _wanted(chosen: argparse.Namespace) -> Any:
    import torch

    from tensorpar.planning.wanted import Wanted, config_of, head_of, num_positions

    config = config_of(chosen.model)
    return Wanted(
        config=config,
        head=head_of(config, chosen.model_class),
        tp=chosen.tp,
        dp=chosen.dp,
        data_parallel=chosen.data_parallel,
        batch=chosen.batch,
        sequence=num_positions(config) if chosen.sequence is None else chosen.sequence,
        dtype=getattr(torch, chosen.dtype),
        optimizer=chosen.optimizer,
        gradient_checkpointing=chosen.gradient_checkpointing,
        sequence_parallel=chosen.sequence_parallel,
    )
