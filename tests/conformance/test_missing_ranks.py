"""Collective calls that a rank never makes, or makes too late."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest

import tensorpar
from tests.conformance.gpt2 import Case, perturbed, refusal

SHORT = timedelta(seconds=2)


def one_is_missing(call: str, folder: str, absent: int) -> str:
    """What present ranks are told when one never makes a collective call."""
    model = tensorpar.DistributedModel(perturbed(Case(), parallel=True))
    tensorpar.barrier()  # the machine may be busy, and building took unlike times
    if tensorpar.rank() == absent:
        return ""
    calls = {
        "save_pretrained": lambda: model.save_pretrained(folder, timeout=SHORT),
        "DistributedModel.state_dict": lambda: model.state_dict(timeout=SHORT),
        "gather_to_rank0": lambda: model.state_dict(gather_to_rank0=True, timeout=SHORT),
    }
    return refusal(calls[call], TimeoutError)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("save_pretrained", "save_pretrained"),
        ("DistributedModel.state_dict", "DistributedModel.state_dict"),
        ("gather_to_rank0", "DistributedModel.state_dict"),
    ],
)
@pytest.mark.parametrize("absent", [0, 2])  # in one world: each round is given up on its own
def test_a_missing_rank_ends_in_a_timeout(ranks, tmp_path, call, named, absent):
    """Present ranks raise a TimeoutError naming call and absent rank; nothing is written."""
    folder = tmp_path / "out"
    results = ranks(4).run(one_is_missing, call, str(folder), absent)
    for rank, told in enumerate(results):
        if rank != absent:
            assert f"{named} was not called by ranks [{absent}] within 2 s" in told
    assert not folder.exists()


def late(folder: str) -> str:
    """What a rank is told that calls when the other has given up."""
    model = perturbed(Case(), parallel=True)
    tensorpar.barrier()
    time.sleep(2 * SHORT.total_seconds() * (tensorpar.rank() == 1))
    return refusal(lambda: model.save_pretrained(folder, timeout=SHORT), TimeoutError)


def saves(folder: str) -> bool:
    """Whether all ranks can save."""
    perturbed(Case(), parallel=True).save_pretrained(folder, timeout=timedelta(seconds=20))
    return (Path(folder) / "config.json").exists()


def test_a_late_rank_is_told_too_and_all_can_save_again(ranks, tmp_path):
    """A rank that comes too late waits in turn; when all call again, they save."""
    in_time, too_late = ranks(2).run(late, str(tmp_path / "late"))
    assert "was not called by ranks [1] within 2 s" in in_time
    assert "was not called by ranks [0] within 2 s" in too_late
    assert not (tmp_path / "late").exists()
    assert ranks(2).run(saves, str(tmp_path / "good")) == [True, True]
