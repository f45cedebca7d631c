"""Translating a state dict in memory: microseconds per key, and how much is a view of its input."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from contest import record

from tensorpar.translators import from_hf, to_hf

LAYERS, TURNS = 28, 21


def measure(_: argparse.Namespace) -> None:
    import transformers

    config = transformers.GPTJConfig(
        n_embd=256, n_inner=1024, n_head=16, n_layer=LAYERS, vocab_size=1000, rotary_dim=8
    )
    tensors = transformers.GPTJForCausalLM(config).state_dict()
    ours = from_hf(tensors, config.to_dict())
    back = to_hf(ours, config.to_dict())
    if any(not torch.equal(back[key], tensor) for key, tensor in tensors.items()):
        raise SystemExit("there and back is not the same")
    rows = {
        "from_hf": told(from_hf, tensors, config.to_dict()),
        "to_hf": told(to_hf, ours, config.to_dict()),
    }
    for name, row in rows.items():
        print(
            f"{name:8} {row['keys']} keys, {row['microseconds per key']:.1f} us per key, "
            f"views: {row['share of views']:.0%}"
        )
    record("in_memory_cpu", {"rows": rows})


def told(translate: Any, tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The median time of several turns, and the share of tensors that are views of the input."""
    seconds = []
    for _ in range(TURNS):
        start = time.perf_counter()
        result = translate(tensors, config)
        seconds.append(time.perf_counter() - start)
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    views = [tensor.untyped_storage().data_ptr() in memory for tensor in result.values()]
    return {
        "keys": len(tensors),
        "microseconds per key": statistics.median(seconds) / len(tensors) * 1e6,
        "share of views": sum(views) / len(views),
    }
