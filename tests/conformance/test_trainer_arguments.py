"""Training arguments that change what a step computes do under tensorpar's Trainer what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import tensorpar
from tests.conformance.families import BEHIND_FLOAT32
from tests.conformance.gpt2 import Tensors, default_dtype, require_close, require_equal_ranks
from tests.conformance.test_trainer import HEADS, MESHES, mine
from tests.conformance.training import announced, arguments, facts, make

SMOOTHED = "smoothed labels, recomputed blocks, SGD"
#: by what is chosen: the arguments, and how far losses, norms and weights may be from one process.
CHOICES: dict[str, tuple[dict[str, Any], float]] = {
    SMOOTHED: (
        {"label_smoothing_factor": 0.1, "activation_checkpointing": True, "optim": "sgd"},
        BEHIND_FLOAT32,
    ),
    "bfloat16": ({"bf16": True}, 0.1),
}


def trained(trainer: type, folder: str, choice: str, **more: Any) -> Tensors:
    """The log and the weights of a run."""
    size = tensorpar.rdp_size() if tensorpar.is_initialized() else 1
    given = {"eval_strategy": "epoch", **CHOICES[choice][0]}
    run = make(trainer, "gpt2", HEADS["gpt2"], arguments(folder, data_ranks=size, **given), **more)
    run.train()
    found = facts(run)
    # sums over all logits, whose rounding adds up
    return {name: x for name, x in found.items() if not name.endswith(("probe", "right"))}


def trained_on_ranks(folder: str, choice: str, kind: Any) -> Tensors:
    """The same on every rank."""
    with announced(), default_dtype(torch.float64):
        return trained(mine(), folder, choice, data_parallel=kind)


@pytest.mark.parametrize(
    ("mesh", "choice"), [*((mesh, SMOOTHED) for mesh in MESHES), ("2 x 2 fsdp", "bfloat16")]
)
def test_arguments_as_usual(ranks, tmp_path, mesh, choice):
    """Loss curve, norms, evaluation and weights are those of Transformers' Trainer."""
    size, degree, kind = MESHES[mesh]
    with default_dtype(torch.float64):
        reference = trained(transformers.Trainer, str(tmp_path / "one"), choice)
    pool = ranks(size, tensor_parallel_degree=degree)
    results = pool.run(trained_on_ranks, str(tmp_path / "many"), choice, kind)
    require_equal_ranks(results)
    require_close(results[0], reference, CHOICES[choice][1])
