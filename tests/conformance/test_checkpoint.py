"""A resumed run is the undisturbed one: bit for bit at the same mesh, to rounding at another."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

import tensorpar
from tensorpar.checkpoint import checksummed
from tests.conformance.families import BEHIND_FLOAT32, build, inputs
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)
from tests.small_disk import small_disk_in

STEPS, SAVED = 6, 3
#: dp x tp, and how data-parallel ranks share the model.
MESHES = {
    "tp 2": (2, 2, None),
    "tp 4": (4, 4, None),
    "one": (1, 1, None),
    "2 x 2 fsdp": (4, 2, "fsdp"),
    "2 x 2 replicate": (4, 2, "replicate"),
    "dp 2 fsdp": (2, 1, "fsdp"),
}


class Loader:
    """A data loader that knows where it is: the number of batches it has given."""

    def __init__(self) -> None:
        self.given = 0

    def rows(self) -> list[dict[str, torch.Tensor]]:
        """One row for each of two data-parallel ranks, or both where there is one."""
        self.given += 1
        rows = [(self.given + row) % 3 for row in range(2)]
        if tensorpar.dp_size() == 2:
            rows = [rows[tensorpar.dp_rank()]]
        given = inputs("GPT2LMHeadModel", labels=True)
        return [{name: x[[row]] for name, x in given.items()} for row in rows]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Run:
    """Everything that a training script holds."""

    def __init__(self, kind: Any = None, *, dropout: float = 0.0, seed: int = 0) -> None:
        config = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
        model = build("gpt2", "GPT2LMHeadModel", parallel=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = config["resid_pdrop"]
        self.model = tensorpar.DistributedModel(model, data_parallel=kind).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.dataloader = Loader()
        self.shared = {"another": Loader()}  # anything that has a state
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    @property
    def parts(self) -> dict[str, Any]:
        names = ("model", "optimizer", "scheduler", "dataloader", "shared")
        return {name: getattr(self, name) for name in names}

    def steps(self, number: int) -> None:
        for _ in range(number):
            scale = 1 + random.random() + np.random.rand()
            rows = self.dataloader.rows()
            (sum(self.model(**row).loss for row in rows) * scale / len(rows)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.shared["another"].given += 2

    def weights(self) -> Tensors:
        given = torch.tensor(self.shared["another"].given)
        return detached(weights_of(self.model.module), "weight") | {"another": given}


def undisturbed(kind: Any, dropout: float) -> Tensors:
    """The weights that every resumed run must have."""
    run = Run(kind, dropout=dropout)
    run.steps(STEPS)
    return run.weights()


def save_midway(folder: str, kind: Any, dropout: float, in_background: bool) -> Tensors:
    """Save after half of the steps, go on to the end."""
    run = Run(kind, dropout=dropout)
    run.steps(SAVED)
    pending = tensorpar.save_checkpoint(
        folder, SAVED, **run.parts, user_content={"note": "half"}, async_save=in_background
    )
    run.steps(STEPS - SAVED)
    if pending is not None:
        pending.wait()
    return run.weights()


def resume(folder: str, kind: Any, dropout: float) -> Tensors:
    """A new process' run, seeded otherwise, from the checkpoint to the end."""
    run = Run(kind, dropout=dropout, seed=99)
    run.steps(1)  # what has been trained before is overwritten
    resumed = tensorpar.load_checkpoint(folder, **run.parts)
    assert resumed == tensorpar.Resumed(SAVED, {"note": "half"})
    run.steps(STEPS - resumed.step)
    return run.weights()


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("mesh", ["tp 2", "2 x 2 fsdp", "2 x 2 replicate"])
def test_resuming_at_the_same_mesh_is_bit_exact(ranks, tmp_path, mesh, in_background):
    """Dropout, schedule, data and every generator go on where they were."""
    size, degree, kind = MESHES[mesh]
    pool, folder = ranks(size, tensor_parallel_degree=degree), str(tmp_path)
    whole = pool.run(save_midway, folder, kind, 0.2, in_background)
    again = pool.run(resume, folder, kind, 0.2)
    for ours, reference in zip(again, whole, strict=True):
        require_close(ours, reference, 0.0)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("tp 2", "tp 4"),
        ("tp 4", "one"),
        ("one", "2 x 2 replicate"),
        ("2 x 2 fsdp", "tp 2"),
        ("tp 2", "dp 2 fsdp"),
        ("2 x 2 replicate", "2 x 2 fsdp"),
    ],
)
def test_resuming_at_another_mesh(ranks, tmp_path, saved, resumed):
    """A run moves between degrees and kinds of data parallelism, and its weights are the same."""
    size, degree, kind = MESHES[saved]
    ranks(size, tensor_parallel_degree=degree).run(save_midway, str(tmp_path), kind, 0.0, False)
    size, degree, kind = MESHES[resumed]
    results = ranks(size, tensor_parallel_degree=degree).run(resume, str(tmp_path), kind, 0.0)
    require_equal_ranks(results)
    reference = ranks(1).run(undisturbed, None, 0.0)[0]
    require_close(results[0], reference, BEHIND_FLOAT32)


def listed(folder: str) -> list[str]:
    """What the folder holds."""
    return sorted(path.name for path in Path(folder).iterdir())


def save_often(folder: str, keep: int | None) -> None:
    """Four saves."""
    run = Run()
    for step in range(4):
        tensorpar.save_checkpoint(folder, step, **run.parts, keep=keep)


def test_old_checkpoints_go(ranks, tmp_path):
    """The newest stay; what an interrupted save has left goes with the next."""
    (tmp_path / ".step-000000007").mkdir()
    ranks(2).run(save_often, str(tmp_path), 2)
    assert listed(str(tmp_path)) == ["step-000000002", "step-000000003"]


def test_all_can_be_kept(ranks, tmp_path):
    """`keep=None`."""
    ranks(2).run(save_often, str(tmp_path), None)
    assert len(listed(str(tmp_path))) == 4


def load_step(folder: str) -> tuple[int | None, Tensors]:
    """Which checkpoint is taken, and the weights."""
    run = Run(seed=5)
    run.steps(2)
    resumed = tensorpar.load_checkpoint(folder, **run.parts)
    return None if resumed is None else resumed.step, run.weights()


def two_saves(folder: str) -> Tensors:
    """Checkpoints of steps 1 and 2; the weights of the first."""
    run = Run()
    run.steps(1)
    tensorpar.save_checkpoint(folder, 1, **run.parts)
    first = run.weights()
    run.steps(1)
    tensorpar.save_checkpoint(folder, 2, **run.parts)
    return first


def flip_a_bit(file: Path, place: float) -> None:
    """Damage one byte at a fraction of the file."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 4
    file.write_bytes(content)


def cut(file: Path, place: float) -> None:
    """Keep the beginning of the file."""
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * place)])


@pytest.mark.parametrize("damage", [flip_a_bit, cut])
@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "complete.json"])
def test_a_damaged_checkpoint_is_passed_over(ranks, tmp_path, name, damage, caplog):
    """Any damage to the newest is found, and the one before it is taken on every rank."""
    first = ranks(2).run(two_saves, str(tmp_path))[0]
    for place in (0.1, 0.5, 0.9):
        (tmp_path / "step-000000002" / name).rename(tmp_path / "whole")
        (tmp_path / "step-000000002" / name).write_bytes((tmp_path / "whole").read_bytes())
        damage(tmp_path / "step-000000002" / name, place)
        for step, weights in ranks(2).run(load_step, str(tmp_path)):
            assert step == 1
            require_close(weights, first, 0.0)
        (tmp_path / "whole").rename(tmp_path / "step-000000002" / name)
    assert ranks(2).run(load_step, str(tmp_path))[0][0] == 2


def refusals(folder: str, empty: str) -> dict[str, Any]:
    """What is said to wrong arguments and other models."""
    run = Run()
    run.steps(1)
    tensorpar.save_checkpoint(folder, 1, **run.parts)
    other = build("gpt2", "GPT2LMHeadModel", parallel=True, config={"inner": 85})
    return {
        "nothing yet": tensorpar.load_checkpoint(empty, **run.parts),
        "step": refusal(lambda: tensorpar.load_checkpoint(folder, 7, **run.parts)),
        "shape": refusal(lambda: tensorpar.load_checkpoint(folder, model=other)),
        "negative": refusal(lambda: tensorpar.save_checkpoint(folder, -1, **run.parts)),
        "keep": refusal(lambda: tensorpar.save_checkpoint(folder, 1, keep=0, **run.parts)),
    }


def test_refusal(ranks, tmp_path):
    """A missing step, another model, wrong numbers: a ValueError on every rank."""
    for told in ranks(2).run(refusals, str(tmp_path / "run"), str(tmp_path / "empty")):
        assert told["nothing yet"] is None
        assert "step = 7, required: one of [1]" in told["step"]
        assert "has shape (83, 40), required (85, 40)" in told["shape"]
        assert "step = -1" in told["negative"]
        assert "keep = 0" in told["keep"]


def failing_save(folder: str, in_background: bool = False) -> tuple[str, int | None]:
    """A save whose disk is full on rank 1; what is said, and what can be resumed after it."""
    run = Run()
    run.steps(1)
    tensorpar.save_checkpoint(folder, 1, **run.parts)
    run.steps(1)

    def save() -> None:
        pending = tensorpar.save_checkpoint(folder, 2, **run.parts, async_save=in_background)
        if pending is not None:
            pending.wait()

    small = small_disk_in(checksummed._Appending, "write", 4096)
    with small if tensorpar.rank() == 1 else nullcontext():
        told = refusal(save, CheckpointException)
    resumed = tensorpar.load_checkpoint(folder, **run.parts)
    return told, None if resumed is None else resumed.step


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_on_one_rank_is_an_error_on_all(ranks, tmp_path, in_background):
    """The checkpoint does not come to be, the one before it stays."""
    for told, step in ranks(2).run(failing_save, str(tmp_path), in_background):
        assert "File too large" in told
        assert step == 1
    assert listed(str(tmp_path)) == ["step-000000001"]
