"""Greedy decoding, milliseconds a token: tensorpar beside one process, its peers and the limit.

The limit is half of what one process takes on one core, plus the latency of an all-reduce for each
collective that tensorpar calls for a token, measured in the same run. It halves what
`generate` and the modules do between products, too, which every rank repeats. So beside it stands
the floor: the least work of tensorpar's ranks, their products, fused attention and collectives
alone, and all that one process does between its own. All contestants must choose the same tokens.
Run as `python benchmarks/bench_decode.py --families gptj`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from chart import bars
from contest import Contestant, Seat, alternate, present, ratio, record
from least import LEAST, least
from models import Shape
from systems import GENERATING, ONE_CORE, SYSTEMS
from torch.utils._python_dispatch import TorchDispatchMode

FAMILIES = ("gpt2", "gptj", "gpt_neo")
PROMPT = 32
VOCABULARY = 50257
ITS_LEAST, LATENCY = "its least work", "latency"


def main() -> None:
    args = parse_arguments()
    rows = []
    for family in args.families:
        for batch in args.batches:
            shape = Shape(family, args.width, args.layers, batch, PROMPT + args.tokens, VOCABULARY)
            print(f"\n{shape}, prompt {PROMPT}")
            rows.append(measured(shape, args))
    record("decode_cpu", {"rows": rows, "arguments": vars(args)})
    ratios = {
        f"{row['family']} x {row['batch']}": {
            name: value["ms a token"] / row["limit"] for name, value in row["systems"].items()
        }
        for row in rows
    }
    bars(ratios, "decode_cpu", "decoding: time against half of one core plus latency")


def measured(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one shape, shown."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        contestants = present(stack, ways(shape, args, folder))
        times, results = alternate(contestants, args.warmup, args.pairs)
    a_call = statistics.median(results.pop(LATENCY)[args.warmup :])
    each = {name: 1e3 * statistics.median(times[name]) / args.tokens for name in results}
    require_same_tokens({name: results[name] for name in results if name not in (LEAST, ITS_LEAST)})
    collectives = results["tensorpar"][0][1] / args.tokens
    row = {
        "family": shape.family,
        "batch": shape.batch,
        "limit": each[ONE_CORE] / args.tp + 1e3 * a_call * collectives,
        "floor": each[LEAST] + each[ONE_CORE] - each[ITS_LEAST],
        "collectives": collectives,
        "latency": a_call,
        "systems": {
            name: {
                "ms a token": value,
                "tensorpar's ratio to it": ratio(times["tensorpar"], times[name]),
            }
            for name, value in each.items()
        },
    }
    show(row)
    return row


def ways(
    shape: Shape, args: argparse.Namespace, folder: str
) -> dict[str, Callable[[], Contestant]]:
    """How each contestant begins, and what the limit and the floor are made of."""
    generate = partial(decode, num_tokens=args.tokens)
    products = partial(least, generate, shape)
    # by name: what is done, by how many ranks, with how many cores together
    entries = {
        ONE_CORE: (partial(generate, "one process", shape), 1, 1),
        **{
            name: (partial(generate, name, shape), 1 if name == "one process" else args.tp, args.tp)
            for name in args.systems
        },
        ITS_LEAST: (partial(products, system="one process"), 1, 1),
        LEAST: (products, args.tp, args.tp),
        LATENCY: (partial(latency, shape), args.tp, args.tp),
    }
    return {name: partial(Contestant, *entry, folder) for name, entry in entries.items()}


def show(row: Mapping[str, Any]) -> None:
    """The table of one shape."""
    limit, floor = row["limit"], row["floor"]
    print(
        f"{row['collectives']:.1f} collectives a token of {1e3 * row['latency']:.3f} ms; "
        f"limit {limit:.2f} ms, floor {floor:.2f} ms"
    )
    print(
        f"{'':24}{'ms a token':>12}{'to limit':>10}{'to floor':>10}{'floor to it':>13}"
        f"{'tensorpar to it':>17}"
    )
    for name, system in row["systems"].items():
        value, ours = system["ms a token"], system["tensorpar's ratio to it"]["median"]
        print(
            f"{name:24}{value:12.2f}{value / limit:10.2f}{value / floor:10.2f}"
            f"{floor / value:13.2f}{ours:17.2f}"
        )


def decode(
    system: str, shape: Shape, seat: Seat, num_tokens: int
) -> Callable[[], tuple[list[list[int]], int]]:
    """What a contestant generates, and how many collectives it called."""
    made = GENERATING[system](shape, seat)
    model = getattr(made.model, "module", made.model).eval()
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(1, shape.vocabulary, (shape.batch, PROMPT), generator=generator)
    model.generation_config.eos_token_id = None  # all tokens are wanted
    wanted = {"max_new_tokens": num_tokens, "do_sample": False}

    def turn() -> tuple[list[list[int]], int]:
        with torch.no_grad(), made.forward(), Collectives() as seen:
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)
        return out[:, PROMPT:].tolist(), seen.count

    # counting goes through every operation; it is done once, before time is taken
    counted = turn()[1]

    def timed() -> tuple[list[list[int]], int]:
        with torch.no_grad(), made.forward():
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)
        return out[:, PROMPT:].tolist(), counted

    return timed


def latency(shape: Shape, _: Seat) -> Callable[[], float]:
    """Seconds of an all-reduce of one token's hidden states."""
    hidden = torch.zeros(shape.batch, 1, shape.width)

    def turn(calls: int = 200) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            torch.distributed.all_reduce(hidden)
        return (time.perf_counter() - start) / calls

    return turn


class Collectives(TorchDispatchMode):
    """Counts collective calls; a message each way between two ranks is one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self.calls.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        is_collective = func.namespace in ("c10d", "_c10d_functional")
        if is_collective and func is not torch.ops.c10d.send.default:
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def require_same_tokens(results: dict[str, list[Any]]) -> None:
    chosen = {name: turns[-1][0] for name, turns in results.items()}
    wrong = [name for name, tokens in chosen.items() if tokens != chosen["one process"]]
    if "tensorpar" in wrong:
        raise SystemExit("tensorpar generates other tokens than one process")
    if wrong:
        print(f"other tokens than one process: {wrong}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tp", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
