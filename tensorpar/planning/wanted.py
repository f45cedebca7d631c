"""What is to be planned: a model, a mesh, a batch, an optimizer; checked before it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tensorpar.data_parallel import Kind
from tensorpar.families import FAMILIES

OptimizerName = Literal["adamw", "sgd"]
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")
}


@dataclass(frozen=True)
class Wanted:
    """A training step.

    Attributes:
        config: Transformers' config of one of the families.
        head: the name of a Transformers class that takes this config.
        tp: tensor-parallel degree; it may exceed the number of heads, and need not divide it.
        dp: how many copies of the model; each is fed a batch of its own.
        data_parallel: what the copies share; matters where `dp` is more than one.
        batch: rows that one copy is fed.
        sequence: tokens in a row.
        dtype: of parameters, gradients, optimizer state and activations.
        optimizer: `"adamw"` (fused) or `"sgd"` (without momentum).
        gradient_checkpointing: whether each block's activations are recomputed in backward.
        sequence_parallel: whether activations between parallel regions are split over tp ranks.

    Raises:
        ValueError: a size that is not positive, a sequence that the model has no positions for, a
            head or family that is not known.
    """

    config: Any
    head: str
    tp: int = 1
    dp: int = 1
    data_parallel: Kind = "fsdp"
    batch: int = 1
    sequence: int = 1024
    dtype: torch.dtype = torch.float32
    optimizer: OptimizerName = "adamw"
    gradient_checkpointing: bool = False
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "batch", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, required: at least 1")
        choices = {"data_parallel": get_args(Kind), "optimizer": get_args(OptimizerName)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}, required: one of {known}")
        self._check_family()
        self._check_head()
        if self.sequence > (positions := num_positions(self.config)):
            raise ValueError(
                f"sequence = {self.sequence}, required: at most the model's positions, {positions}"
            )

    def _check_family(self) -> None:
        if self.config.model_type not in FAMILIES:
            raise ValueError(
                f"model_type = {self.config.model_type!r}, required: one of {sorted(FAMILIES)}; "
                "models without a plan are not sharded"
            )

    def _check_head(self) -> None:
        import transformers

        found = getattr(transformers, self.head, None)
        takes = getattr(found, "config_class", None)
        if takes is None or not isinstance(self.config, takes):
            raise ValueError(
                f"model class = {self.head!r}, required: a class of Transformers for "
                f"{type(self.config).__name__}; name it by --model-class"
            )
        if "MultipleChoice" in self.head or "DoubleHeads" in self.head:
            raise ValueError(
                f"model class = {self.head!r}, required: one that is fed rows of tokens; rows of "
                "choices are not planned, their figures are those of batch x choices rows"
            )


def num_positions(config: Any) -> int:
    """The longest row that the model has positions for; RoBERTa's begin after the padding's."""
    positions: int = config.max_position_embeddings
    return positions - (config.pad_token_id + 1 if config.model_type == "roberta" else 0)


def config_of(path: Path) -> Any:
    """The Transformers config at a `config.json` or in a model's folder.

    Raises:
        ValueError: there is none, or it is of no known family.
    """
    import json

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model = {str(path)!r}, required: a config.json or a folder that has one")
    try:
        told = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"model = {str(path)!r}, required: a config in JSON; {error}") from None
    family = told.get("model_type") if isinstance(told, dict) else None
    if family not in FAMILIES:
        raise ValueError(f"model_type = {family!r}, required: one of {sorted(FAMILIES)}")
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{k: v for k, v in told.items() if k != "model_type"})


def head_of(config: Any, given: str | None) -> str:
    """The class that is planned: the one given, or that which the config was saved from.

    Raises:
        ValueError: neither tells.
    """
    name: str | None = given or next(iter(config.architectures or ()), None)
    if name is None:
        raise ValueError(
            "architectures = None in the config, required: the model's class; name it by "
            "--model-class, such as GPT2LMHeadModel"
        )
    return name


def described(wanted: Wanted) -> str:
    """One line."""
    told = {field.name: getattr(wanted, field.name) for field in fields(wanted)}
    names = ("gradient_checkpointing", "sequence_parallel")
    options = "".join(f", {name.replace('_', ' ')}" for name in names if told[name])
    copies = f" x dp {told['dp']} ({told['data_parallel']})" if wanted.dp > 1 else ""
    return (
        f"{told['head']}, tp {told['tp']}{copies}, batch {told['batch']} x {told['sequence']} per "
        f"copy, {str(told['dtype'])[6:]}, {told['optimizer']}{options}"
    )
