"""Trainer on a model with adapters by peft: trained, saved and resumed as in one process."""

from __future__ import annotations

import shutil
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.conformance.families import build
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    require_close,
    require_equal_ranks,
)
from tests.conformance.test_life_cycle_lora import lora, whole_adapters
from tests.conformance.training import BATCH, NUM_ROWS, announced, arguments, rows

#: what peft asks of Transformers is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
FAMILY, HEAD = "bert", "BertForSequenceClassification"


def adapted_run(trainer: type, folder: str, resume: bool = False) -> Tensors:
    """The log of a run, the adapters it ended with, and an export."""
    args = arguments(folder, save_strategy="steps", save_steps=3, eval_strategy="epoch")
    model = build(FAMILY, HEAD, parallel=trainer is not transformers.Trainer)
    torch.manual_seed(5)
    run = trainer(
        model=peft.get_peft_model(model, lora(FAMILY)),
        args=args,
        train_dataset=rows(HEAD, NUM_ROWS, 3),
        eval_dataset=rows(HEAD, BATCH, 4),
    )
    run.train(resume_from_checkpoint=resume)
    run.save_model(f"{folder}/exported")
    found = {
        f"step {entry['step']} {name}": torch.tensor(entry[name], dtype=torch.float64)
        for entry in run.state.log_history
        for name in ("loss", "grad_norm", "eval_loss")
        if name in entry
    }
    return detached(found, "log") | detached(whole_adapters(run.model), "adapter")


def adapted_run_on_ranks(*args: Any) -> Tensors:
    """The same on every rank."""
    from tensorpar.trainer import Trainer

    with announced(), default_dtype(torch.float64):
        return adapted_run(Trainer, *args)


def test_adapters_train_and_resume(ranks, tmp_path):
    """Log, adapters and files are those of one process; resumed in mid-epoch, bit for bit."""
    with default_dtype(torch.float64):
        reference = adapted_run(transformers.Trainer, str(tmp_path / "one"))
    folder = tmp_path / "two"
    results = ranks(2).run(adapted_run_on_ranks, str(folder))
    require_equal_ranks(results)
    require_close(results[0], reference, 1e-10)
    files = [
        load_file(tmp_path / name / "exported/adapter_model.safetensors") for name in ("two", "one")
    ]
    require_close(*files, 1e-10)
    shutil.rmtree(folder / "checkpoint-4")
    resumed = ranks(2).run(adapted_run_on_ranks, str(folder), True)
    require_close(resumed[0], results[0], 0.0)
