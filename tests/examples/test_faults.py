"""A run that every fault of the README's table has struck ends with undisturbed weights."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from tests.examples import faulty_training
from tests.examples.fault_table import README, stated, steps_lost, told_by
from tests.examples.faulty_training import Faults, train

ROOT = Path(__file__).parents[2]
SCRIPT = ["--module", faulty_training.__name__]
#: five lives of one run: three are ended by torchrun, the last by a script started again.
FAULTS = ["step", "stop", "flip", "save", "truncate", "disk", "agent"]
#: the rows of the table that a test here holds against what happens, and those of other files.
HERE = ["step", "stop", "save", "step flip", "step truncate", "disk", "agent", "sigterm"]
ELSEWHERE = [(name, "tests/examples/test_two_nodes.py") for name in ("step", "node")]


def undisturbed(folder: str) -> None:
    """The same run in the test's own ranks, from wherever it stands; nothing strikes it."""
    train(Path(folder), Faults(Path(folder), []))


def torchrun(*arguments: str) -> tuple[int, str]:
    """Its exit code and output, once all who write it have ended.

    A rank that is stopped does not obey torchrun's SIGTERM, and would be killed 30 s later; here it
    goes on at once, to obey.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", *arguments]
    output = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line)
                if told := re.search(r"Sending process (\d+) closing signal SIGTERM", line):
                    with suppress(ProcessLookupError):
                        os.kill(int(told[1]), signal.SIGCONT)
        finally:
            process.kill()
    return process.returncode, "".join(output)


def require_same_end(run: Path, reference: Path) -> None:
    """Final weights, bit for bit."""
    ours, theirs = (load_file(folder / "final/model.safetensors") for folder in (run, reference))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(x) for name, x in theirs.items())


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """The folder of a run that nothing has struck."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ranks(2).run(undisturbed, str(folder))
    return folder


def test_faults_cost_no_more_than_steps(ranks, whole, tmp_path):
    """Killed, silent, damaged, full: torchrun restarts, the run resumes, the end is bit for bit."""
    struck = tmp_path / "struck"
    code, output = torchrun("--max-restarts=3", *SCRIPT, str(struck), *FAULTS)
    assert (struck / "struck-agent").exists(), output
    assert code == -signal.SIGKILL
    assert "Timed out waiting 8000ms" in output  # for the rank that was stopped
    # without torchrun ranks find each other no more: they end when they next need to
    assert all(f"[rank{rank}]: torch.distributed.DistNetworkError" in output for rank in (0, 1))
    names = sorted(path.name for path in (struck / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:09}" for step in (1, 2, 4)]
    require_same_end(struck, whole)
    ranks(2).run(undisturbed, str(struck))  # the script, started again
    require_same_end(struck, whole)
    table = stated()
    for rank in range(2):
        lines = told_by(struck, rank)
        # damage to the newest checkpoint, that of step 2, leaves the one before it
        assert [line["start"] for line in lines if "start" in line] == [0, 2, 1, 1, 4]
        assert [line["step"] for line in lines if "not_saved" in line] == [3]
        assert any("File too large" in line.get("not_saved", "") for line in lines)
        (step, _), (stop, flip), (save, truncate), (agent, _) = steps_lost(lines)
        lost = {"step": step, "stop": stop, "save": save, "agent": agent}
        lost |= {"step flip": step + flip, "step truncate": step + truncate}
        lost["disk"] = 0  # the run has gone on: it was not started again, as the starts show
        assert lost == {name: table[name, ""] for name in lost}
    assert output.count("checkpoint of step 2 in") == 2 * 2  # on each rank, twice


def test_sigterm_loses_nothing(ranks, whole, tmp_path):
    """All ranks save after their step and leave; the script goes on from there."""
    code, output = torchrun("--max-restarts=1", *SCRIPT, str(tmp_path), "sigterm")
    assert code != 0
    assert "Received 15 death signal" in output
    assert not (tmp_path / "final").exists()
    ranks(2).run(undisturbed, str(tmp_path))
    for rank in range(2):
        lines = told_by(tmp_path, rank)
        assert [line["start"] for line in lines if "start" in line] == [0, 3]
        assert steps_lost(lines) == [(stated()["sigterm", ""], 0)]
    require_same_end(tmp_path, whole)


def test_the_table_is_what_is_tested():
    """Its rows are those whose figures tests measure, and its command starts the script."""
    assert sorted(stated()) == sorted([*((name, "") for name in HERE), *ELSEWHERE])
    strikes = {*faulty_training.AT, "flip", "truncate"}
    assert {word for name, _ in stated() for word in name.split()} == strikes
    assert faulty_training.__doc__ is not None
    assert strikes <= set(re.findall(r"^    (\w+) ", faulty_training.__doc__, re.MULTILINE))
    (command,) = (line for line in README.splitlines() if "tests.examples.faulty_training" in line)
    read = get_args_parser().parse_args(shlex.split(command)[1:])
    assert (read.training_script, read.nproc_per_node) == (faulty_training.__name__, "2")
    for file in (Path(__file__), *(ROOT / file for _, file in ELSEWHERE)):
        assert str(file.relative_to(ROOT)) in README
