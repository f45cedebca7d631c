"""Trainer and Accelerator on ranks do what Transformers' Trainer does in one process."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tensorpar
from tests.conformance.families import BEHIND_FLOAT32
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)
from tests.conformance.test_checkpoint import cut, flip_a_bit
from tests.conformance.training import (
    NUM_TESTED,
    announced,
    arguments,
    facts,
    make,
    rows,
)

HEADS = {"gpt2": "GPT2LMHeadModel", "bert": "BertForSequenceClassification"}
#: Transformers computes a causal model's loss in float32 whatever the model's dtype.
TOLERANCE = {"gpt2": BEHIND_FLOAT32, "bert": 1e-10}
#: dp x tp, and how data-parallel ranks share the model.
MESHES = {
    "tp 2": (2, 2, "replicate"),
    "2 x 2 replicate": (4, 2, "replicate"),
    "2 x 2 fsdp": (4, 2, "fsdp"),
}


def mine() -> type:
    """The class under test, which is imported where it is needed: it brings Transformers' along."""
    from tensorpar.trainer import Trainer

    return Trainer


def whole_life(trainer: type, folder: str, family: str, **more: Any) -> Tensors:
    """Train until it gets no better, go back to the best, predict, export."""
    args = arguments(
        folder,
        data_ranks=tensorpar.rdp_size() if tensorpar.is_initialized() else 1,
        num_train_epochs=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    patience = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    run = make(trainer, family, HEADS[family], args, callbacks=[patience], **more)
    run.train()
    found = facts(run) | detached({"best": torch.tensor(run.state.best_metric)}, "state")
    tested = run.predict(rows(HEADS[family], NUM_TESTED, 5))
    run.save_model(f"{folder}/exported")
    found["predictions"] = torch.as_tensor(tested.predictions)
    found["steps"] = torch.tensor([run.state.global_step, run.state.max_steps])
    return found


def whole_life_on_ranks(folder: str, family: str, kind: Any) -> Tensors:
    """The same on every rank."""
    with announced(), default_dtype(torch.float64):
        return whole_life(mine(), folder, family, data_parallel=kind)


@pytest.mark.feature("Trainer: loss curve, norms, evaluation, best model, prediction, export")
@pytest.mark.parametrize("family", sorted(HEADS))
def test_law_parity(ranks, tmp_path, family):
    """Every figure that is logged, the weights, the predictions in their order and the export."""
    with default_dtype(torch.float64):
        reference = whole_life(transformers.Trainer, str(tmp_path / "one"), family)
        taken, planned = reference["steps"].tolist()
        assert taken < planned
        for name, (size, degree, kind) in MESHES.items():
            folder = tmp_path / name
            pool = ranks(size, tensor_parallel_degree=degree)
            results = pool.run(whole_life_on_ranks, str(folder), family, kind)
            require_equal_ranks(results)
            require_close(results[0], reference, TOLERANCE[family])
            cls = getattr(transformers, HEADS[family])
            for place in ("exported", f"checkpoint-{taken}"):
                again = cls.from_pretrained(folder / place)
                if place == "exported":
                    exported = detached(weights_of(again), "weight")
            require_close(exported, {k: x for k, x in results[0].items() if "weight" in k}, 0.0)
            assert len(list(folder.glob("checkpoint-*"))) == 2


class Signalled(transformers.TrainerCallback):
    """A rank is sent SIGTERM in the middle of a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index == self.rank and state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGTERM)


def resumable(
    folder: str, kind: Any, dropout: float, resume: Any = None, signalled: int = 0
) -> tuple[Tensors, bool]:
    """A run that saves every step, or when it is told to go; what it did, and whether it was."""
    with announced(), default_dtype(torch.float64):
        saving = {"save_strategy": "epoch"} if signalled else {"save_steps": 1}
        args = arguments(
            folder,
            data_ranks=tensorpar.rdp_size(),
            **{"save_strategy": "steps", "eval_strategy": "epoch", **saving},
        )
        callbacks = [Signalled(1, signalled)] if signalled else []
        more = {"callbacks": callbacks, "data_parallel": kind}
        run = make(mine(), "gpt2", HEADS["gpt2"], args, **more)
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        run.train(resume_from_checkpoint=resume)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return facts(run), run.preempted


@pytest.mark.parametrize("mesh", ["tp 2", "2 x 2 fsdp"])
def test_sigterm_and_resuming(ranks, tmp_path, mesh):
    """One rank is signalled: all save after that step and return; the run goes on bit for bit."""
    size, degree, kind = MESHES[mesh]
    pool, folder = ranks(size, tensor_parallel_degree=degree), str(tmp_path / "run")
    whole = pool.run(resumable, str(tmp_path / "whole"), kind, 0.1)
    for _, preempted in pool.run(resumable, folder, kind, 0.1, None, 3):
        assert preempted
    assert sorted(path.name for path in Path(folder).iterdir()) == ["checkpoint-2", "checkpoint-3"]
    again = pool.run(resumable, folder, kind, 0.1, True)
    for (ours, preempted), (reference, _) in zip(again, whole, strict=True):
        assert not preempted
        require_close(ours, reference, 0.0)


def refused_resumes(folder: str, alone: str) -> dict[str, str]:
    """What is said to checkpoints that cannot be resumed from."""
    from tensorpar.trainer import DamagedCheckpointError

    def told(folder: str, resume: Any, error: type[Exception]) -> str:
        run = make_run(folder)
        return refusal(lambda: run.train(resume_from_checkpoint=resume), error)

    def make_run(folder: str) -> Any:
        return make(mine(), "gpt2", HEADS["gpt2"], arguments(folder))

    with announced():
        return {
            "half": told(folder, f"{folder}/checkpoint-9", DamagedCheckpointError),
            "bit": told(folder, f"{folder}/checkpoint-3", DamagedCheckpointError),
            "all": told(alone, True, DamagedCheckpointError),
            "none": told(f"{folder}/checkpoint-9", True, ValueError),
        }


def test_resuming_passes_over_damage_and_moves_between_meshes(ranks, tmp_path):
    """The newest whole checkpoint is found and taken, at another mesh to rounding."""
    folder = tmp_path / "run"
    whole = ranks(2).run(resumable, str(folder), "replicate", 0.0)[0][0]
    (folder / "checkpoint-9").mkdir()
    cut(folder / "checkpoint-4" / "trainer_state.json", 0.5)
    flip_a_bit(folder / "checkpoint-3" / "step-000000003" / "__1_0.distcp", 0.5)
    shutil.copytree(folder / "checkpoint-3", tmp_path / "alone" / "checkpoint-3")
    for name, (size, degree, kind) in MESHES.items():
        pool, own = ranks(size, tensor_parallel_degree=degree), tmp_path / name
        shutil.copytree(folder, own)
        results = pool.run(resumable, str(own), kind, 0.0, True)
        found = results[0][0]
        # an epoch is evaluated after the checkpoint of its last step
        assert {name for name in whole if "step 2 eval" not in name} == found.keys()
        require_close(found, {name: whole[name] for name in found}, BEHIND_FLOAT32)
    for told in ranks(2).run(refused_resumes, str(folder), str(tmp_path / "alone")):
        assert "checkpoint-9 is damaged or half-written: no complete" in told["half"]
        assert "checkpoint-3 is damaged: " in told["bit"]
        assert "every checkpoint in" in told["all"]
        assert "No valid checkpoint" in told["none"]
