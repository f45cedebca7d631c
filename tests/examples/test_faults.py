"""A run that every fault of the README's table has struck ends with undisturbed weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.examples.faulty_training import Faults, train

ROOT = Path(__file__).parents[2]
#: three lives of one run: two of them are ended by a kill.
FAULTS = ["step", "flip", "save", "truncate", "disk", "agent"]


def undisturbed(folder: str) -> None:
    """The same run in the test's own ranks, which nothing strikes."""
    train(Path(folder), Faults(Path(folder), []))


def told_by(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank has noted, in all its lives."""
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def test_faults_cost_no_more_than_steps(ranks, tmp_path):
    """Killed, damaged, full: torchrun restarts, the run resumes, and the end is bit for bit."""
    whole, struck = tmp_path / "undisturbed", tmp_path / "struck"
    whole.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2"]
    script = ["--nproc-per-node=2", "--module", "tests.examples.faulty_training"]
    run = subprocess.run(
        [*torchrun, *script, str(struck), *FAULTS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        check=False,
    )
    assert (struck / "struck-agent").exists(), run.stdout
    assert run.returncode == -signal.SIGKILL
    for rank in range(2):
        lines = told_by(struck, rank)
        # damage to the newest checkpoint, that of step 2, leaves the one before it
        assert [line["start"] for line in lines if "start" in line] == [0, 1, 1]
        assert [line["step"] for line in lines if "not_saved" in line] == [3]
        assert any("File too large" in line.get("not_saved", "") for line in lines)
    assert run.stdout.count("checkpoint of step 2 in") == 2 * 2  # on each rank, twice
    ranks(2).run(undisturbed, str(whole))
    ours, reference = (load_file(run / "final/model.safetensors") for run in (struck, whole))
    assert ours.keys() == reference.keys()
    assert all(ours[name].equal(x) for name, x in reference.items())
    # without torchrun ranks find each other no more: they end when they next need to
    names = sorted(path.name for path in (struck / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:09}" for step in (1, 2, 4)]
    assert all(f"[rank{rank}]: torch.distributed.DistNetworkError" in run.stdout for rank in (0, 1))
