"""All that a training run is made of, as one state dict for torch.distributed.checkpoint.

Tensors of the model and the optimizer are DTensors under their names, which any mesh can read. The
rest travels as bytes: what all ranks share once, and what is a rank's own (random states, the
position in its data) under that rank.
"""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tensorpar import ranks

#: the beginning of every name under which bytes are kept.
PACKAGES = "package/"
COMMON = f"{PACKAGES}common"


class Stateful(Protocol):
    """What has a state of its own: a scheduler, a data loader, a gradient scaler."""

    def state_dict(self) -> Any:
        """What must be kept."""

    def load_state_dict(self, state_dict: Any, /) -> None:
        """Continue from what was kept."""


@dataclass(frozen=True)
class TrainingState:
    """What is saved and resumed.

    Args:
        model: the parallel model.
        optimizer: over its parameters.
        shared: objects whose state is the same on all ranks, by name.
        dataloader: whose state is that of a data-parallel rank.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    shared: Mapping[str, Stateful]
    dataloader: Stateful | None

    def tensors(self) -> dict[str, Any]:
        """The sharded part; loading in place needs it too."""
        found: dict[str, Any] = {"model": get_model_state_dict(self.model)}
        if self.optimizer is not None:
            found["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer)
        return found

    def collected(self, step: int, user_content: Any) -> dict[str, Any]:
        """Everything of this rank, under names that no two ranks use for different things."""
        common = {
            "step": step,
            "user_content": user_content,
            "shared": {name: one.state_dict() for name, one in self.shared.items()},
        }
        own = {"place": (ranks.dp_rank(), ranks.tp_rank()), "random": random_states()}
        if self.dataloader is not None:
            own["dataloader"] = self.dataloader.state_dict()
        place = f"{PACKAGES}rank {ranks.rank()}"
        return {**self.tensors(), COMMON: packed(common), place: packed(own)}

    def restore(
        self,
        tensors: Mapping[str, Any],
        common: Mapping[str, Any],
        everyone: Sequence[Mapping[str, Any]],
    ) -> None:
        """Continue from what has been read.

        Args:
            tensors: what has been read into `tensors()`.
            common: what all ranks share.
            everyone: what was each rank's own.

        Raises:
            ValueError: data-parallel ranks were at positions of their own, and are fewer or more.
        """
        own = self._of_this_rank(everyone)
        set_model_state_dict(self.model, tensors["model"])
        if self.optimizer is not None:
            set_optimizer_state_dict(self.model, self.optimizer, tensors["optimizer"])
        for name, one in self.shared.items():
            one.load_state_dict(common["shared"][name])
        if self.dataloader is not None:
            self.dataloader.load_state_dict(own["dataloader"])
        set_random_states(own["random"])

    def _of_this_rank(self, everyone: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """What the rank at the same place of the mesh saved, or the nearest to it."""
        by_place = {own["place"]: own for own in everyone}
        num_dp = 1 + max(dp for dp, _ in by_place)
        if self.dataloader is not None and num_dp != ranks.dp_size():
            positions = {packed(own["dataloader"]) for own in everyone}
            if len(positions) > 1:
                raise ValueError(
                    f"data-parallel ranks = {ranks.dp_size()}, required: {num_dp}, each of which "
                    "saved a data position of its own; resume with as many, or use a loader whose "
                    "state counts global batches"
                )
        dp, tp = ranks.dp_rank(), ranks.tp_rank()
        places = ((dp, tp), (dp, 0), (0, 0))
        return next(by_place[place] for place in places if place in by_place)


def packed(value: Any) -> bytes:
    """One value that torch.distributed.checkpoint does not look into."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def unpacked(value: bytes) -> Any:
    """The inverse of `packed`; runs what a pickle runs, so only of one's own checkpoints."""
    return torch.load(io.BytesIO(value), map_location="cpu", weights_only=False)


def random_states() -> dict[str, Any]:
    """The states of every generator that training draws from."""
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    states["numpy"] = np.random.get_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
