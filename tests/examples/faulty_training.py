"""A training run to be disturbed, by the tests or by hand:

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 -m tests.examples.faulty_training \\
        FOLDER FAULT ...

It resumes from the newest checkpoint, as any script should, and writes its weights to
FOLDER/final. Each FAULT strikes once, when those before it have; FOLDER remembers which have.

    step      the last rank is killed between forward and backward
    stop      the last rank stops answering, at the same place
    save      the last rank is killed while it writes a checkpoint
    flip      a bit of the newest checkpoint is flipped when the run starts again
    truncate  a file of the newest checkpoint is cut when the run starts again
    disk      the last rank's disk is full during a save
    agent     after the last step torchrun is killed, its ranks are left alone
    node      after the last step the first node, torchrun and ranks, is gone
    sigterm   torchrun is told to go, as schedulers do, and tells its ranks; all save and leave
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.checkpoint.api import CheckpointException

import tensorpar
from tensorpar.checkpoint import checksummed
from tests.small_disk import small_disk_in

STEPS = 4
TIMEOUT = timedelta(seconds=60)
#: in a life in which a rank will stop answering, for those who watch.
SHORT_TIMEOUT = timedelta(seconds=8)
#: how many steps have been taken when a fault strikes.
AT = {"step": 2, "stop": 2, "save": 2, "disk": 2, "sigterm": 2, "agent": STEPS, "node": STEPS}


@dataclass(frozen=True)
class Faults:
    """What is yet to strike."""

    folder: Path
    names: list[str]

    def is_next(self, name: str, step: int | None = None) -> bool:
        """Whether it is this fault's turn, and its step."""
        left = [one for one in self.names if not (self.folder / f"struck-{one}").exists()]
        return left[:1] == [name] and (step is None or step == AT[name])

    def note(self, name: str) -> None:
        """It strikes now."""
        (self.folder / f"struck-{name}").touch()


def build(*, parallel: bool) -> Any:
    """The same model in torch's default dtype, whichever way it is run."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_embd=40,
        n_head=5,
        n_positions=16,
        vocab_size=97,
        bos_token_id=0,
        eos_token_id=0,
    )
    for dropout in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, dropout, 0.0)
    with tensorpar.tensor_parallelism() if parallel else nullcontext():
        return transformers.GPT2LMHeadModel(config).train()


def batch(step: int) -> torch.Tensor:
    """`[4, 12]` tokens: all rows of a step, for however many data-parallel ranks there are."""
    return torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(step))


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def train(folder: Path, faults: Faults) -> None:
    """The rank's part of the run, from wherever it stands to its end; in float64."""
    torch.set_default_dtype(torch.float64)
    inner = build(parallel=True)
    kind = "fsdp" if tensorpar.dp_size() > 1 else None
    model = tensorpar.DistributedModel(inner, data_parallel=kind)
    parts = {"model": model, "optimizer": optimizer_of(model)}
    place = str(folder / "checkpoints")
    damage(faults)
    resumed = tensorpar.load_checkpoint(place, **parts)
    start = 0 if resumed is None else resumed.step
    note(folder, start=start, node=node(), dp=tensorpar.dp_rank(), tp=tensorpar.tp_rank())
    with tensorpar.preemption() as preempted:
        for step in range(start, STEPS):
            note(folder, step=step, loss=one_step(parts, step, faults))
            save(place, step + 1, parts, faults)
            if preempted():
                return
    inner.save_pretrained(folder / "final")
    if faults.is_next("agent", STEPS) or faults.is_next("node", STEPS):
        end_the_first_node(faults)
        one_step(parts, STEPS, faults)
        save(place, STEPS + 1, parts, faults)


def one_step(parts: dict[str, Any], step: int, faults: Faults) -> float:
    """Returns the loss of this data-parallel rank's rows."""
    note(faults.folder, begun=step)
    rows = batch(step).chunk(tensorpar.dp_size())[tensorpar.dp_rank()]
    loss = parts["model"](input_ids=rows, labels=rows).loss
    if faults.is_next("step", step) and is_last():
        end_this_process(faults, "step")
    if faults.is_next("stop", step) and is_last():
        end_this_process(faults, "stop", signal.SIGSTOP)
    if faults.is_next("sigterm", step) and is_last():
        tell_torchrun_to_go(faults)
    loss.backward()
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()
    return loss.item()


def save(place: str, step: int, parts: dict[str, Any], faults: Faults) -> None:
    """A full disk costs this checkpoint only; a script may also let the error end the run."""
    full = nullcontext()
    if faults.is_next("save", step - 1) and is_last():
        checksummed.Checksummed.transform_to = lambda *_: end_this_process(faults, "save")
    if faults.is_next("disk", step - 1) and is_last():
        faults.note("disk")
        full = small_disk_in(checksummed._Appending, "write", 4096)
    try:
        with full:
            tensorpar.save_checkpoint(place, step, **parts, timeout=TIMEOUT)
        note(faults.folder, saved=step)
    except CheckpointException as error:
        note(faults.folder, step=step, not_saved=str(error))
        logging.warning("the checkpoint of step %d was not written: %s", step, error)


def damage(faults: Faults) -> None:
    """Spoil the newest checkpoint that the run, just started again, has left."""
    files = sorted((faults.folder / "checkpoints").glob("step-*/__0_0.distcp"))
    if tensorpar.rank() != 0 or not files:
        return
    content = bytearray(files[-1].read_bytes())
    half = len(content) // 2
    if faults.is_next("flip"):
        content[half] ^= 4
        faults.note("flip")
    elif faults.is_next("truncate"):
        del content[half:]
        faults.note("truncate")
    files[-1].write_bytes(content)


def end_this_process(faults: Faults, name: str, by: signal.Signals = signal.SIGKILL) -> None:
    faults.note(name)
    os.kill(os.getpid(), by)


def tell_torchrun_to_go(faults: Faults) -> None:
    """And wait until it has told this rank, so that all know by the end of the step.

    Whichever of the process's threads the signal is given to, its number is written to the wakeup
    descriptor.
    """
    faults.note("sigterm")
    told, tell = socket.socketpair()
    tell.setblocking(False)
    with told, tell:
        before = signal.set_wakeup_fd(tell.fileno())
        os.kill(os.getppid(), signal.SIGTERM)
        told.recv(1)
        signal.set_wakeup_fd(before)


def end_the_first_node(faults: Faults) -> None:
    """Its torchrun first, which would otherwise tell the others; those that are left return."""
    torchrun, everything = os.getppid(), faults.is_next("node", STEPS)
    tensorpar.barrier()
    if node() == 0 and tensorpar.local_rank() == 0:
        faults.note("node" if everything else "agent")
        os.kill(torchrun, signal.SIGKILL)
    if node() == 0 and everything:
        os.kill(os.getpid(), signal.SIGKILL)


def node() -> int:
    return int(os.environ.get("GROUP_RANK", "0"))


def is_last() -> bool:
    return tensorpar.rank() == tensorpar.size() - 1


def note(folder: Path, **facts: Any) -> None:
    """One more line of what this rank has to tell."""
    with (folder / f"rank-{tensorpar.rank()}.jsonl").open("a") as file:
        file.write(json.dumps(facts) + "\n")


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    faults = Faults(folder, names)
    timeout = SHORT_TIMEOUT if faults.is_next("stop") else TIMEOUT
    tensorpar.init(tensor_parallel_degree=2, timeout=timeout)
    train(folder, faults)


if __name__ == "__main__":
    main()
