"""Every name of Transformers' `Trainer` that is not documented, in one place.

As `hf_compat` is for its models: a release that renames one is mended here. The hooks by which a
`Trainer` keeps and finds what it must resume from get names of our own.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

_HOOKS = (
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
    "_save_rng_state",
    "_load_rng_state",
    "_load_from_checkpoint",
    "_load_best_model",
    "create_accelerator_and_postprocess",
    "call_model_init",
    "get_total_train_batch_size",
)
if missing := [name for name in _HOOKS if not hasattr(transformers.Trainer, name)]:
    raise RuntimeError(
        f"transformers = {transformers.__version__} has no Trainer.{missing[0]}, required: a "
        "version within tensorpar's range (setup.cfg)"
    )


class HookedTrainer(transformers.Trainer, ABC):
    """A `Trainer` whose subclass keeps, restores and takes back everything, on all ranks.

    Random states are part of everything; `Trainer` asks for them apart, later.
    """

    @abstractmethod
    def keep(self, folder: str) -> None:
        """Write model, optimizer, scheduler and random states."""

    @abstractmethod
    def require(self, folder: str) -> None:
        """Raise unless `restore` could read the folder."""

    @abstractmethod
    def restore(self, folder: str) -> None:
        """The inverse of `keep`."""

    @abstractmethod
    def restore_random_states(self) -> None:
        """Those that `restore` has read, again: data has been skipped in between."""

    @abstractmethod
    def restore_best(self, folder: str) -> None:
        """The model alone."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.keep(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.restore(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.restore_random_states()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: object) -> None:
        self.require(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.restore_best(self.state.best_model_checkpoint)

    def multiplies_wrongly(self) -> bool:
        """Whether the loss is a mean over this rank's labels that would be taken for a share.

        `Trainer` multiplies losses by the number of ranks, which is right for those that the model
        has divided by the labels of all ranks. Many models ignore that number and take the mean.
        """
        divided = self.compute_loss_func is not None or self.label_smoother is not None
        model = getattr(self.model, "get_base_model", lambda: self.model)()
        forward = inspect.unwrap(type(model).forward)
        return not divided and "loss_function" not in forward.__code__.co_names

    def tokenizers(self) -> Any:
        """What is saved beside the model: the processing class, or the collator's tokenizer."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)


def known_by_own_name(model: nn.Module) -> nn.Module:
    """`model`, whose class FSDP2 may have given a prefix.

    `Trainer` tells by the name whether labels that it smooths are those of the next position.
    """
    if isinstance(model, FSDPModule):
        own = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
        type(model)._get_name = lambda _: own.__name__  # type: ignore[method-assign]
    return model


def checkpoints(output_dir: str) -> list[str]:
    """The folders of a run that are called as checkpoints are, the newest first."""
    names = re.compile(r"checkpoint-(\d+)")
    found = [
        (int(match[1]), str(path))
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir() and (match := names.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def state_damage(folder: str) -> str | None:
    """What is wrong with the `Trainer`'s own state in a checkpoint, which it writes last."""
    try:
        transformers.TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError) as error:
        return f"{TRAINER_STATE_NAME}: {error!r}"
    return None


def arguments_file(folder: str) -> Path:
    """Where the training arguments are saved beside a model."""
    return Path(folder) / TRAINING_ARGS_NAME
