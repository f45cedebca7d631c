"""One training step of GPT-2: tensor parallel on two processes against one process with both cores.

The two contestants alternate within one run, so that what else the machine does hits both alike,
and the losses of every step are compared before any time is believed. Run with `make bench`, or
`python benchmarks/bench_step.py --pairs 20`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
MAX_LOSS_DIFFERENCE = 1e-3


def main() -> None:
    args = parse_arguments()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        contestants = {
            "one process": Contestant(context, args, 1, args.threads, folder),
            "tensorpar": Contestant(context, args, args.tp, args.threads // args.tp, folder),
        }
        try:
            times, losses = alternate(contestants, args.warmup, args.pairs)
        finally:
            for contestant in contestants.values():
                contestant.close()
    check_losses(losses)
    report(args, times, losses)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="cores that each side may use")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--dropout", type=float, default=0.0)
    return parser.parse_args()


def alternate(
    contestants: dict[str, Contestant], warmup: int, pairs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and loss of every step, the contestants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    for step in tqdm(range(warmup + pairs), desc="alternating steps"):
        for name, contestant in contestants.items():
            seconds, loss = contestant.step()
            losses[name].append(loss)
            if step >= warmup:
                times[name].append(seconds)
    return times, losses


def check_losses(losses: dict[str, list[float]]) -> None:
    pairs = zip(*losses.values(), strict=True)
    worst = max(abs(one - other) for one, other in pairs)
    if worst > MAX_LOSS_DIFFERENCE:
        raise SystemExit(f"losses differ by {worst:.2e}, required: {MAX_LOSS_DIFFERENCE:.0e}")


def report(
    args: argparse.Namespace, times: dict[str, list[float]], losses: dict[str, list[float]]
) -> None:
    ratios = sorted(
        ours / one for ours, one in zip(times["tensorpar"], times["one process"], strict=True)
    )
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"\n{'contestant':14}{'median s':>10}{'best s':>10}{'last loss':>12}")
    for name, seconds in times.items():
        row = f"{statistics.median(seconds):10.3f}{min(seconds):10.3f}{losses[name][-1]:12.5f}"
        print(f"{name:14}{row}")
    print(f"ratio tensorpar / one process: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
    best = min(times["tensorpar"]) / min(times["one process"])
    result = {
        "ratio": {"median": middle, "quartiles": [low, high], "of best": best},
        "seconds": times,
        "shape": vars(args),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"step_cpu_{datetime.now(UTC):%Y%m}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def versions() -> dict[str, str]:
    import transformers

    import tensorpar

    return {
        "tensorpar": tensorpar.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {mp.cpu_count()} cores",
    }


@dataclass(frozen=True)
class Seat:
    """One process's place: its rank among how many, its threads, and where they meet."""

    rank: int
    num_ranks: int
    threads: int
    rendezvous: str


class Contestant:
    """Processes that train one model, stepping when told to."""

    def __init__(
        self, context: Any, args: argparse.Namespace, ranks: int, threads: int, folder: str
    ) -> None:
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            seat = Seat(rank, ranks, threads, f"{folder}/{ranks}")
            process = context.Process(target=serve, args=(theirs, args, seat), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def step(self) -> tuple[float, float]:
        """Seconds until the slowest rank is done, and the loss."""
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(True)
        losses = [pipe.recv() for pipe in self.pipes]
        return time.perf_counter() - start, losses[0]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(False)
        for process in self.processes:
            process.join(timeout=10)


def serve(pipe: Any, args: argparse.Namespace, seat: Seat) -> None:
    torch.set_num_threads(seat.threads)
    step = training_step(args, seat)
    pipe.send(None)
    while pipe.recv():
        pipe.send(step())


def training_step(args: argparse.Namespace, seat: Seat) -> Callable[[], float]:
    model = build(args, seat)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)

    def step() -> float:
        tokens = torch.randint(args.vocabulary, (args.batch, args.sequence), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def build(args: argparse.Namespace, seat: Seat) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=args.vocabulary,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 64,
        n_positions=args.sequence,
        resid_pdrop=args.dropout,
        embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    if seat.num_ranks == 1:
        return GPT2LMHeadModel(config)
    import tensorpar

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{seat.rendezvous}",
        rank=seat.rank,
        world_size=seat.num_ranks,
    )
    tensorpar.init(tensor_parallel_degree=seat.num_ranks, device_type="cpu")
    with tensorpar.tensor_parallelism():
        return GPT2LMHeadModel(config)


if __name__ == "__main__":
    main()
