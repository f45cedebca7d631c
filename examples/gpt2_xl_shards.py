"""GPT-2 XL (25 heads, vocabulary 50257) at tp 2, 4 and 8, one rank after the other in one process.

    python examples/gpt2_xl_shards.py

Neither 25 nor 50257 divides by 2, so what a rank holds is worth a look: each builds the real
model with `delayed_parameter_initialization=True`, so it allocates and fills its own shards and
nothing else. This needs no 8 processes: torch's fake process group says "rank r of n" and its
collectives do nothing. Building needs none of their answers: they compare the ranks' models
before the cut, which here are one and the same, and take what is replicated from the first rank.
So sizes and memory are real; equality across ranks is what the tests with real ranks show.

The bound is counted from the configuration alone: whatever is cut may take the ceiling of its
share, and what is not cut is whole on every rank. The command fails if a rank holds more than
1.03 times that, or if the shards do not add up to the model. It needs about 3.5 GB (half of that
with --dtype bfloat16) and a minute.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, GPT2Config

import tensorpar as tp

TOLERANCE = 1.03
MB = 2**20


@dataclass(frozen=True)
class Held:
    """What one rank holds: counts, and bytes as the allocator and the kernel see them."""

    num_parameters: int
    num_sharded: int
    num_bytes: int
    peak_bytes: int | None
    num_heads: int
    warnings: tuple[str, ...]


def bound(config: GPT2Config, degree: int) -> int:
    """Parameters of the largest rank when every cut axis is dealt out by ceilings."""

    def share(size: int) -> int:
        return -(-size // degree)

    width, inner = config.n_embd, 4 * config.n_embd
    attended = share(config.n_head) * (width // config.n_head)  # heads are cut whole
    attention = 3 * (width + 1) * attended + attended * width
    mlp = (width + 1) * share(inner) + share(inner) * width
    replicated = 2 * width + 2 * 2 * width  # biases of the two row-parallel layers, two norms
    layers = config.n_layer * (attention + mlp + replicated)
    return share(config.vocab_size) * width + config.n_positions * width + layers + 2 * width


def build_as(rank: int, degree: int, config: GPT2Config) -> Held:
    """Build the model as `rank` of `degree` ranks, look at its shards, and drop it again."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=degree)
    tp.init(tensor_parallel_degree=degree, device_type="cpu")
    before = memory("VmRSS", reset_peak=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tp.tensor_parallelism(delayed_parameter_initialization=True):
            model = AutoModelForCausalLM.from_config(config)
    peak = memory("VmHWM")
    try:
        parameters = [p for p in model.parameters() if isinstance(p, DTensor)]  # all are
        shards = [p.to_local() for p in parameters]
        # a dict by address: storage that two of them shared would count once
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in shards}
        return Held(
            num_parameters=sum(x.numel() for x in shards),
            num_sharded=sum(p.to_local().numel() for p in parameters if p.placements[0].is_shard()),
            num_bytes=sum(storage.nbytes() for storage in storages.values()),
            peak_bytes=None if peak is None or before is None else peak - before,
            num_heads=model.transformer.h[0].attn.c_attn.weight.to_local().shape[1],
            warnings=tuple(str(warning.message) for warning in caught),
        )
    finally:
        tp.shutdown()


def memory(field: str, *, reset_peak: bool = False) -> int | None:
    """Bytes from Linux's /proc: VmRSS, resident now, or VmHWM, its peak. None elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    if reset_peak:
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what the last model left in glibc's heap would be reused unseen
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def check_degree(config: GPT2Config, degree: int) -> bool:
    """Build every rank at one degree, print a row for each; whether all is well."""
    allowed = bound(config, degree)
    ratios, num_sharded, num_replicated = [], 0, 0
    for rank in range(degree):
        held = build_as(rank, degree, config)
        ratios.append(held.num_bytes / (allowed * config.dtype.itemsize))
        num_sharded += held.num_sharded
        num_replicated = held.num_parameters - held.num_sharded
        peak = "-" if held.peak_bytes is None else f"{held.peak_bytes / MB:,.0f}"
        print(
            f"{degree:>3}{rank:>6}{held.num_parameters:>14,}{held.num_bytes / MB:>10,.1f}"
            f"{peak:>16}{ratios[-1]:>10.4f}{held.num_heads:>7}",
            flush=True,
        )
        for message in held.warnings:
            print(f"     warned: {message}")
    print(
        f"    bound{allowed:>14,}{allowed * config.dtype.itemsize / MB:>10,.1f}"
        f"{'largest ratio':>16}{max(ratios):>10.4f}\n"
    )
    adds_up = num_sharded + num_replicated == bound(config, 1)
    return adds_up and max(ratios) <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description="Sizes of GPT-2 XL's shards at tp 2, 4 and 8.")
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    config = GPT2Config(n_embd=1600, n_layer=48, n_head=25, dtype=dtype)
    started = time.perf_counter()
    whole = bound(config, 1)
    print(
        f"GPT-2 XL: {config.n_head} heads, vocabulary {config.vocab_size}, {whole:,} parameters, "
        f"{whole * dtype.itemsize / MB:,.1f} MB in {args.dtype}\n\n"
        " tp  rank    parameters   MB held  peak growth MB  to bound  heads"
    )
    kept = [check_degree(config, degree) for degree in args.degrees]
    print(f"{time.perf_counter() - started:.0f} s")
    if not all(kept):
        print(
            f"FAILED: a rank holds more than {TOLERANCE} times the bound, or the shards do not add "
            "up to the model",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
