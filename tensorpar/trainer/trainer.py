"""Transformers' `Trainer` for tensor-parallel models: its loop, its arguments, its callbacks.

Only what ranks must do together is other than there: data is dealt out to data-parallel ranks, a
checkpoint is written and read by all, and all leave at the same step when one is told to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tensorpar import ranks
from tensorpar.checkpoint import load_checkpoint, save_checkpoint
from tensorpar.checkpoint.folder import CheckpointFolder
from tensorpar.checkpoint.state import random_states, set_random_states
from tensorpar.data_parallel import DataParallel, Kind
from tensorpar.hf_trainer import (
    HookedTrainer,
    arguments_file,
    checkpoints,
    known_by_own_name,
    state_damage,
)
from tensorpar.model import DistributedModel
from tensorpar.model_doors import logits_unread
from tensorpar.preemption import preemption
from tensorpar.together import on_all_ranks
from tensorpar.trainer.accelerator import Accelerator, require_parallel
from tensorpar.trainer.leaving import LeaveTogether

logger = logging.getLogger(__name__)


class DamagedCheckpointError(RuntimeError):
    """A checkpoint that cannot be resumed from; the model's values are undefined."""


class Trainer(HookedTrainer):
    """`transformers.Trainer` for tensor-parallel models; every rank makes and calls it alike.

    A checkpoint is an ordinary Hugging Face folder and, beside it, a sharded one with checksums of
    model, optimizer, scheduler and random states, which is what is resumed from: on any mesh, if
    `per_device_train_batch_size` times the data-parallel ranks stays what it was. On SIGTERM to any
    rank all end the step, save (unless `save_strategy` is `"no"`) and return from `train`;
    `preempted` says so.

    Args:
        model: built within `tensor_parallelism()`, plain or in a `DistributedModel`.
        args: `TrainingArguments`; the batch size "per device" is that of a data-parallel rank.
        rest, kwargs: as for `transformers.Trainer`.
        data_parallel: as for `DistributedModel`; used where there are several data-parallel ranks
            and the model is not data parallel already.

    Attributes:
        preempted: whether the last `train` ended early since a rank was sent SIGTERM.

    Raises:
        RuntimeError: before `init`.
        ValueError: the model is not tensor parallel, or an argument asks for what each rank would
            do alone, or for another way to shard.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *rest: Any,
        data_parallel: DataParallel | Kind = "replicate",
        **kwargs: Any,
    ) -> None:
        self.preempted = False
        self._random_states: dict[str, Any] = {}
        self._data_parallel = (
            DataParallel(data_parallel) if isinstance(data_parallel, str) else data_parallel
        )
        if args is not None:
            refuse_lonely_choices(args)
        if model is not None:
            model = self._made_ready(model)
        super().__init__(model, args, *rest, **kwargs)
        if self.multiplies_wrongly():
            self.args.average_tokens_across_devices = False

    def _made_ready(self, model: nn.Module) -> nn.Module:
        inner = model.get_module() if isinstance(model, DistributedModel) else model
        require_parallel(inner)
        if not hasattr(inner, "save_pretrained"):
            raise ValueError(
                f"model = {type(inner).__name__}, required: a Transformers model, or peft's"
            )
        if ranks.rdp_size() > 1 and not isinstance(inner, FSDPModule):
            self._data_parallel.apply(inner, ranks.dp_mesh())
        return known_by_own_name(inner)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model, made data parallel."""
        return self._made_ready(super().call_model_init(trial))

    def create_accelerator_and_postprocess(self) -> None:
        """As Transformers does, with an accelerator that counts data-parallel ranks."""
        super().create_accelerator_and_postprocess()
        Accelerator.become(self.accelerator)
        self.gather_function = partial(type(self.accelerator).gather_for_metrics, self.accelerator)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As Transformers does; where only the loss is wanted, logits stay sharded."""
        with logits_unread() if prediction_loss_only else nullcontext():
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """As Transformers does; loader processes of ranks that share a model draw alike."""
        loader = super().get_train_dataloader()
        seeding = getattr(loader, "worker_init_fn", None)
        if isinstance(seeding, partial) and "rank" in seeding.keywords:
            loader.worker_init_fn = partial(seeding, rank=ranks.rdp_rank())
        return loader

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of one optimizer step: data-parallel ranks have their own, others share them."""
        per_rank: int = self._train_batch_size * args.gradient_accumulation_steps
        return per_rank * ranks.rdp_size()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Transformers does; collective.

        Args:
            resume_from_checkpoint: a folder, or True for the newest in `output_dir` that is whole:
                damaged or half-written ones are reported and passed over.
            kwargs: as for `transformers.Trainer.train`.

        Raises:
            ValueError: there is no such checkpoint, or it is not of this kind.
            DamagedCheckpointError: the folder, or every one in `output_dir`, is damaged.
        """
        if resume_from_checkpoint is not True:
            return self._train(resume_from_checkpoint or None, **kwargs)
        told = []
        for folder in self._on_first_rank(lambda: checkpoints(self.args.output_dir)):
            try:
                return self._train(folder, **kwargs)
            except DamagedCheckpointError as error:
                logger.warning("%s; the one before it is taken", error)
                told.append(str(error))
        if told:
            raise DamagedCheckpointError(
                f"every checkpoint in {self.args.output_dir} is damaged: {told}"
            )
        raise ValueError(f"No valid checkpoint found in output directory ({self.args.output_dir})")

    def _train(self, folder: str | None, **kwargs: Any) -> Any:
        with self._leaving_together():
            return super().train(resume_from_checkpoint=folder, **kwargs)

    @contextmanager
    def _leaving_together(self) -> Iterator[None]:
        with preemption() as preempted:
            callback = LeaveTogether(preempted)
            self.add_callback(callback)
            try:
                yield
            finally:
                self.remove_callback(callback)
                self.preempted = callback.left

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a Hugging Face folder; collective over all ranks, written by the first."""
        folder = self.args.output_dir if output_dir is None else output_dir
        self.model.save_pretrained(folder)
        if self.args.should_save:
            if (tokenizers := self.tokenizers()) is not None:
                tokenizers.save_pretrained(folder)
            torch.save(self.args, arguments_file(folder))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def keep(self, folder: str) -> None:
        """Write the sharded checkpoint into a checkpoint's folder; collective."""
        save_checkpoint(folder, self.state.global_step, keep=1, **self._parts())

    def require(self, folder: str) -> None:
        """Raise on all ranks unless a folder has a whole checkpoint of ours, by its small files."""
        damage = self._on_first_rank(partial(_damage, folder))
        if damage is not None:
            raise DamagedCheckpointError(
                f"checkpoint {folder} is damaged or half-written: {damage}"
            )

    def restore(self, folder: str) -> None:
        """Read the sharded checkpoint, of whatever mesh; collective."""
        try:
            resumed = load_checkpoint(folder, **self._parts())
        except RuntimeError as error:
            raise DamagedCheckpointError(f"{folder} is damaged: {error}") from error
        if resumed is None:
            raise DamagedCheckpointError(f"{folder} has no sharded checkpoint inside")
        self._random_states = random_states()

    def restore_random_states(self) -> None:
        """Those of the checkpoint that was restored."""
        set_random_states(self._random_states)

    def restore_best(self, folder: str) -> None:
        """Read the model of a checkpoint, and nothing else; collective."""
        own = random_states()
        load_checkpoint(folder, model=self.model)
        set_random_states(own)

    def _parts(self) -> dict[str, Any]:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return {"model": self.model, "optimizer": optimizer, "scheduler": self.lr_scheduler}

    def _on_first_rank(self, step: Any) -> Any:
        return on_all_ranks("Trainer.train", lambda: step() if ranks.rank() == 0 else None)[0]


def _damage(folder: str) -> str | None:
    inside = CheckpointFolder(folder)
    steps = inside.steps()
    if not steps:
        return "no complete sharded checkpoint inside"
    return inside.damage(steps[-1]) or state_damage(folder)


#: arguments that would have each rank act alone, with what they must be and what to do.
_LONELY = {
    "enable_jit_checkpoint": (False, "this Trainer saves on SIGTERM, all ranks at the same step"),
    "auto_find_batch_size": (False, "ranks would find different ones; choose the batch size"),
    "fsdp": ([], 'pass data_parallel="fsdp"'),
    "deepspeed": (None, 'pass data_parallel="fsdp"'),
    "parallelism_config": (None, "tensorpar.init(tensor_parallel_degree=...) makes the mesh"),
    "torch_compile": (False, "a parallel model is not compiled"),
}


def refuse_lonely_choices(args: Any) -> None:
    """Raise ValueError for training arguments that cannot be kept under tensor parallelism."""
    for name, (required, advice) in _LONELY.items():
        if value := getattr(args, name, None):
            raise ValueError(f"{name} = {value!r}, required: {required!r}; {advice}")
    if args.save_only_model and args.load_best_model_at_end:
        raise ValueError(
            "save_only_model = True with load_best_model_at_end, required: one of them; the best "
            "model is read from a checkpoint's shards"
        )
