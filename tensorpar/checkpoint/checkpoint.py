"""Save a training run and resume it, at the same mesh or another, on torch.distributed.checkpoint.

At the same mesh a resumed run continues bit for bit; at another its losses agree to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tensorpar import mesh, ranks
from tensorpar.checkpoint.folder import CheckpointFolder
from tensorpar.checkpoint.state import COMMON, PACKAGES, Stateful, TrainingState, unpacked
from tensorpar.gathering import TIMEOUT
from tensorpar.model import DistributedModel
from tensorpar.rendezvous import rendezvous
from tensorpar.together import on_all_ranks

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint had beside the states it has restored.

    Attributes:
        step: at which it was saved.
        user_content: as it was given.
    """

    step: int
    user_content: Any


@dataclass(frozen=True)
class PendingSave:
    """A save that goes on while training continues; `wait` ends it, on every rank."""

    _finish: Callable[[], None]

    def wait(self) -> None:
        """Until the checkpoint is complete; collective.

        Raises:
            CheckpointException: a rank could not write; there is no such checkpoint then.
        """
        self._finish()


def save_checkpoint(
    path: str,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Stateful | None = None,
    dataloader: Stateful | None = None,
    shared: Mapping[str, Stateful] | None = None,
    user_content: Any = None,
    keep: int | None = 3,
    async_save: bool = False,
    timeout: timedelta = TIMEOUT,
) -> PendingSave | None:
    """Write model, optimizer, scheduler, all random states and the data position; collective.

    The checkpoint exists once it is whole: it is written aside, brought to the medium and renamed.

    Args:
        path: the run's folder, or a URL that fsspec knows; every rank must see the same.
        step: how many steps have been taken; a checkpoint of the same step is replaced.
        model: the parallel model, or a `DistributedModel`.
        optimizer: over the model's parameters.
        scheduler: the learning rate's.
        dataloader: anything with `state_dict` and `load_state_dict`; each data-parallel rank's
            state is kept.
        shared: other objects whose state is the same on all ranks, such as a `GradScaler`.
        user_content: any picklable object; the first rank's is kept.
        keep: how many checkpoints stay; None keeps all.
        async_save: write in the background, from copies in host memory.
        timeout: how long to wait for the last rank to call this.

    Returns:
        With `async_save`, what to `wait` for before the next save and before the end.

    Raises:
        TimeoutError: a rank does not make this call in time; on all ranks that do.
        CheckpointException: a rank could not write; on all. Earlier checkpoints are as they were.
        ValueError: `step` is negative or `keep` below 1.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step = {step}, keep = {keep}, required: at least 0, and at least 1")
    rendezvous("save_checkpoint", timeout)
    folder = CheckpointFolder(str(path))
    state = _state(model, optimizer, scheduler, dataloader, shared).collected(step, user_content)
    _on_first_rank("save_checkpoint", lambda: folder.prepare(step))
    writer = folder.writer(step)
    if async_save:
        writing = state_dict_saver.async_save(
            state, storage_writer=writer, process_group=_background_group()
        )
        assert isinstance(writing, Future)
        return PendingSave(partial(_finish, writing.result, folder, step, keep))
    _finish(partial(state_dict_saver.save, state, storage_writer=writer), folder, step, keep)
    return None


def _finish(
    write: Callable[[], Any], folder: CheckpointFolder, step: int, keep: int | None
) -> None:
    try:
        write()
    except BaseException:
        if ranks.rank() == 0:
            folder.abandon(step)
        raise
    _on_first_rank("save_checkpoint", lambda: folder.complete(step, keep))


def load_checkpoint(
    path: str,
    step: int | Literal["latest"] = "latest",
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Stateful | None = None,
    dataloader: Stateful | None = None,
    shared: Mapping[str, Stateful] | None = None,
    timeout: timedelta = TIMEOUT,
) -> Resumed | None:
    """Continue from a checkpoint, of any mesh; collective. Each rank reads what it needs.

    With `"latest"`, a checkpoint that is found damaged is reported and the one before it is taken.

    Args:
        path: as for `save_checkpoint`, and so are the objects that are restored.
        step: of which checkpoint.
        model, optimizer, scheduler, dataloader, shared: of the kinds that were saved.
        timeout: how long to wait for the last rank to call this.

    Returns:
        What else was saved; None where `step` is `"latest"` and there is no checkpoint yet.

    Raises:
        TimeoutError: a rank does not make this call in time; on all ranks that do.
        ValueError: no checkpoint of that step; the model is another; each data-parallel rank's
            data position was its own and their number is another.
        RuntimeError: all checkpoints are damaged; the model's values are undefined then.
    """
    rendezvous("load_checkpoint", timeout)
    folder = CheckpointFolder(str(path))
    state = _state(model, optimizer, scheduler, dataloader, shared)
    steps, damages = _on_first_rank("load_checkpoint", partial(_candidates, folder))
    if step != "latest":
        if step not in steps:
            raise ValueError(f"step = {step}, required: one of {steps}, which {path} has")
        steps = [step]
    told = []
    for candidate in reversed(steps):
        found = damages.get(candidate) or _read(state, folder, candidate)
        if isinstance(found, Resumed):
            return found
        told.append(f"step {candidate}: {found}")
        logger.warning("checkpoint of step %d in %s is damaged: %s", candidate, path, found)
    if told:
        raise RuntimeError(f"every checkpoint in {path} is damaged: {told}; the model is undefined")
    return None


def _candidates(folder: CheckpointFolder) -> tuple[list[int], dict[int, str]]:
    """All steps, and what is wrong with the metadata of some."""
    steps = folder.steps()
    return steps, {step: damage for step in steps if (damage := folder.damage(step)) is not None}


def _read(state: TrainingState, folder: CheckpointFolder, step: int) -> Resumed | str:
    """Restore everything, or say what is damaged; the same on all ranks."""
    reader = folder.reader(step)
    metadata = reader.read_metadata()
    tensors = state.tensors()
    _require_fitting(tensors, metadata, f"{folder.path}, step {step}")
    packages = [name for name in metadata.state_dict_metadata if name.startswith(PACKAGES)]
    wanted = {**tensors, **dict.fromkeys(packages, b"")}
    try:
        state_dict_loader.load(wanted, storage_reader=reader)
    except CheckpointException as error:
        return "; ".join(f"rank {rank}: {one[0]!r}" for rank, one in error.failures.items())
    common = unpacked(wanted[COMMON])
    state.restore(wanted, common, [unpacked(wanted[name]) for name in packages if name != COMMON])
    return Resumed(common["step"], common["user_content"])


def _require_fitting(wanted: Mapping[str, Any], metadata: Metadata, place: str) -> None:
    stored = metadata.state_dict_metadata
    flat, _ = flatten_state_dict(dict(wanted))
    problems = [f"{name} is missing" for name in flat if name not in stored]
    shapes = {
        name: (tuple(found.size), tuple(value.shape))
        for name, value in flat.items()
        if isinstance(found := stored.get(name), TensorStorageMetadata)
        and isinstance(value, torch.Tensor)
    }
    problems += [
        f"{name} has shape {stored_shape}, required {shape}"
        for name, (stored_shape, shape) in shapes.items()
        if stored_shape != shape
    ]
    if problems:
        raise ValueError(f"{place} does not fit the model or optimizer: " + "; ".join(problems))


def _state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Stateful | None,
    dataloader: Stateful | None,
    shared: Mapping[str, Stateful] | None,
) -> TrainingState:
    inner = model.get_module() if isinstance(model, DistributedModel) else model
    alike = dict(shared or {})
    if scheduler is not None:
        alike["scheduler"] = scheduler
    return TrainingState(inner, optimizer, alike, dataloader)


def _on_first_rank(call: str, step: Callable[[], T]) -> T:
    """What `step` returns on the first rank, or raises there, on all; collective."""
    return on_all_ranks(call, lambda: step() if ranks.rank() == 0 else None)[0]  # type: ignore[return-value]


def _background_group() -> dist.ProcessGroup:
    """A group of its own for writing in the background, one for each world."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _background_groups:
        _background_groups[world] = dist.new_group(backend="gloo", timeout=mesh.world().timeout)
    return _background_groups[world]


_background_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()
