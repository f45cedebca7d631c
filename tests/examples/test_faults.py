"""A run whose rank is killed ends with the weights of an undisturbed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("faulty_training.py")
FAULTS = ("none", "step", "save")


def start(folder: Path, fault: str) -> subprocess.Popen[str]:
    """The script under torchrun, which may restart it."""
    (folder / fault).mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    return subprocess.Popen(
        [*torchrun, "--nproc-per-node=2", str(SCRIPT), str(folder / fault), fault],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_rank_costs_no_more_than_a_step(tmp_path):
    """Killed in a step and in a save: torchrun restarts, the run resumes, bit for bit."""
    runs = {fault: start(tmp_path, fault) for fault in FAULTS}
    told = {fault: run.communicate(timeout=250)[0] for fault, run in runs.items()}
    for fault, run in runs.items():
        assert run.returncode == 0, told[fault]
        assert (tmp_path / fault / "struck").exists() == (fault != "none")
    weights = [load_file(tmp_path / fault / "final/model.safetensors") for fault in FAULTS]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all(other[name].equal(x) for name, x in weights[0].items())
