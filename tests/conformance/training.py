"""Runs of a `Trainer` on rows that have different numbers of labels, in one process or on ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState

from tests.conformance.families import build
from tests.conformance.gpt2 import Tensors, detached, weights_of

#: how many rows one micro-batch has, over all data-parallel ranks.
BATCH = 4
NUM_ROWS, NUM_TESTED = 12, 7


def rows(head: str, number: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """A dataset; each row has more labels that count than the one before it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, 97, (number, 9), generator=generator)
    if "LM" not in head:
        return [{"input_ids": ids, "labels": ids[0] % 2} for ids in drawn]
    place = torch.arange(9)
    return [
        {"input_ids": ids, "labels": ids.masked_fill(place > 2 + row % 7, -100)}
        for row, ids in enumerate(drawn)
    ]


@contextmanager
def announced() -> Iterator[None]:
    """Within: the environment is as torchrun makes it."""
    here = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    values = {**dict(zip(names, (here[0], here[0], here[1], here[1]), strict=True))}
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update({name: str(value) for name, value in values.items()}, OMP_NUM_THREADS="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def arguments(folder: str | Path, *, data_ranks: int = 1, **changes: Any) -> Any:
    """Training arguments under which much happens in few steps."""
    chosen = {
        "per_device_train_batch_size": BATCH // data_ranks,
        "per_device_eval_batch_size": BATCH // data_ranks,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**chosen, **changes})


def metrics(prediction: Any) -> dict[str, float]:
    """What only full logits of all rows in their order give."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    right = (logits.argmax(-1) == labels).double().mean()
    return {"probe": float((logits * weights).sum()), "right": float(right)}


def make(
    trainer: type,
    family: str,
    head: str,
    args: Any,
    *,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """A trainer of either class around a perturbed float64 model."""
    model = build(family, head, parallel=trainer is not transformers.Trainer, config=config)
    return trainer(
        model=model,
        args=args,
        train_dataset=rows(head, NUM_ROWS, 3),
        eval_dataset=rows(head, 2 * BATCH, 4),
        compute_metrics=metrics,
        **more,
    )


def facts(trainer: Any) -> Tensors:
    """The log of a run and the weights it ended with."""
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_probe", "eval_right")
    found = {
        f"step {entry['step']} {name}": torch.tensor(entry[name], dtype=torch.float64)
        for entry in trainer.state.log_history
        for name in kept
        if name in entry
    }
    model = getattr(trainer.model, "module", trainer.model)
    return detached(found, "log") | detached(weights_of(model), "weight")
