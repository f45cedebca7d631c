"""`torchrun --nnodes 2`: tensor parallel inside each node, data parallel across."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conformance.families import BEHIND_FLOAT32
from tests.conformance.gpt2 import default_dtype, require_close
from tests.examples.fault_table import Lines, stated, steps_lost, told_by
from tests.examples.faulty_training import AT, STEPS, batch, build, optimizer_of
from tests.examples.test_faults import require_same_end, undisturbed
from tests.two_nodes import two_nodes

#: of this file, in the README's table.
FILE = "tests/examples/test_two_nodes.py"


def one_process() -> tuple[list[float], dict[str, Any]]:
    """Losses and final weights of Transformers alone, fed the rows of all ranks."""
    with default_dtype(torch.float64):
        model = build(parallel=False)
    optimizer = optimizer_of(model)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


@dataclass(frozen=True)
class Disturbed:
    """A run that has ended: on what kind of nodes, and what is left of it."""

    kind: str
    folder: Path
    codes: list[int]
    output: list[str]

    def told(self) -> list[Lines]:
        """What each of the four ranks has noted, in all its lives."""
        return [told_by(self.folder, rank) for rank in range(4)]


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """A run on two nodes: a rank is killed, all start again, in the end one node dies."""
    folder = tmp_path_factory.mktemp("run")
    files = [folder / f"node-{node}.txt" for node in range(2)]
    arguments = ["--max-restarts=1", "--module", "tests.examples.faulty_training", str(folder)]
    with two_nodes() as nodes, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        runs = [nodes.torchrun(n, files[n], *arguments, "step", "node") for n in range(2)]
        try:
            codes = [run.wait(timeout=250) for run in runs]
        finally:
            for run in runs:
                run.kill()
    return Disturbed(nodes.kind, folder, codes, [file.read_text() for file in files])


def test_two_nodes_train_as_one_process(disturbed, record_property):
    """With a rank killed on the way: losses, final weights; and who shares a model with whom."""
    record_property("summary", f"torchrun --nnodes 2 ran on {disturbed.kind}")
    told = disturbed.told()
    losses, weights = one_process()
    for rank, lines in enumerate(told):
        place = {"node": rank // 2, "dp": rank // 2, "tp": rank % 2}
        assert [line for line in lines if "start" in line] == [
            {"start": start} | place for start in (0, AT["step"])
        ], disturbed.output[rank // 2]
        assert [line["step"] for line in lines if "loss" in line] == list(range(STEPS))
    for step, expected in enumerate(losses):
        found = [line["loss"] for lines in told for line in lines if line.get("step") == step]
        assert sum(found) / 4 == pytest.approx(expected, abs=BEHIND_FLOAT32)
    final = load_file(disturbed.folder / "final/model.safetensors")
    require_close(final, {name: weights[name].detach() for name in final}, BEHIND_FLOAT32)


def test_the_end_is_that_of_an_undisturbed_run(ranks, disturbed, tmp_path):
    """Bit for bit: what a rank's death has undone is done again, the same."""
    ranks(4, tensor_parallel_degree=2).run(undisturbed, str(tmp_path))
    require_same_end(disturbed.folder, tmp_path)


def test_steps_lost(ranks, disturbed, tmp_path):
    """As the README's table says; the run is started again once its node is gone."""
    folder = shutil.copytree(disturbed.folder, tmp_path / "again")
    ranks(4, tensor_parallel_degree=2).run(undisturbed, str(folder))
    require_same_end(folder, disturbed.folder)
    lost = [steps_lost(told_by(folder, rank)) for rank in range(4)]
    for life, name in enumerate(("step", "node")):
        # the ranks of the node that is gone had not begun the step that the others had
        assert max(one[life] for one in lost) == (stated()[name, FILE], 0)
        assert all(damaged == 0 for _, damaged in (one[life] for one in lost))


def test_the_others_end_when_a_node_is_gone(disturbed):
    """Its peers neither wait for it nor end in silence."""
    code, output = disturbed.codes[1], disturbed.output[1]
    assert (disturbed.folder / "struck-node").exists()
    assert disturbed.codes[0] == -signal.SIGKILL
    assert code == 1
    # a rank says the first, torchrun the second, and whoever is quicker ends the other
    assert "Connection closed by peer" in output or "connection to the C10d store has" in output
