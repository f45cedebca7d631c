"""A rank that stops answering, its connections open: the others wait for the stated time only."""

from __future__ import annotations

import os
import signal
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

import tensorpar
from tests.conformance.families import build, inputs
from tests.conformance.gpt2 import refusal

#: on a busy machine ranks reach a collective some seconds after each other.
SHORT = timedelta(seconds=6)
SILENT = 3


def one_falls_silent(folder: str, port: int) -> tuple[str, str]:
    """What a step and a save say to a rank when another, of 2 x 2, is stopped between two steps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    places = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, str(value))
        tensorpar.init(tensor_parallel_degree=2, timeout=SHORT)
    model = build("gpt2", "GPT2LMHeadModel", parallel=True)
    model = tensorpar.DistributedModel(model, data_parallel="fsdp").train()

    def step() -> None:
        model(**inputs("LM", labels=True)).loss.backward()

    step()
    told = [Path(folder, str(one)) for one in range(size)]
    told[rank].write_text(str(os.getpid()))
    tensorpar.barrier()
    if rank == SILENT:
        os.kill(os.getpid(), signal.SIGSTOP)
        return "", ""
    try:
        said = refusal(step, RuntimeError)
        path, short = f"{folder}/run", SHORT / 3
        save = refusal(
            lambda: tensorpar.save_checkpoint(path, 1, model=model, timeout=short), TimeoutError
        )
        return said, save
    finally:
        # the last one to be done lets it go on, or it could not end
        pid = int(told[SILENT].read_text())
        told[rank].unlink()
        if not any(one.exists() for one in told[:SILENT]):
            os.kill(pid, signal.SIGCONT)


def test_the_others_end_within_the_timeout(ranks, tmp_path):
    """Those who share a model with it, or data: what `init` was told holds for every group."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    results = ranks(4, init=False).run(one_falls_silent, str(tmp_path), port, timeout=60)
    for said, save in results[:SILENT]:
        assert "Timed out waiting 6000ms" in said
        assert "save_checkpoint was not called by ranks [3] within 2 s" in save
    assert not (tmp_path / "run").exists()
