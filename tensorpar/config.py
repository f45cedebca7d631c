"""What `init` accepts, checked before anything is started.

The keys are those of smdistributed's configuration dict, as far as they have a meaning on stock
PyTorch; a key that is not listed is refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

#: placement strategies, and whether neighbouring ranks are tensor-parallel peers (tp innermost).
PLACEMENTS = {
    **dict.fromkeys(("cluster", "DPT", "DTP", "PDT"), True),
    **dict.fromkeys(("spread", "TPD", "TDP", "PTD"), False),
}

_CHOICES = {"placement_strategy": set(PLACEMENTS), "optimize": {"speed", "memory"}}
_ONLY_ONE = {
    "pipeline_parallel_degree": "raise tensor_parallel_degree instead",
    "microbatches": "accumulate gradients in the training loop instead",
}


@dataclass(frozen=True)
class Config:
    """The parallel configuration of this process; equal on all ranks.

    Attributes:
        tensor_parallel_degree: ranks that share one model; must divide the world size.
        prescaled_batch: True when all tensor-parallel ranks are fed the same batch. False:
            `DistributedModel` gathers their batches at its door and hands each rank its outputs.
        placement_strategy: `"cluster"` puts tensor-parallel ranks side by side, `"spread"`
            data-parallel ones; or the order of the letters D, P, T, the last varying fastest.
        delayed_parameter_initialization: default of `tensor_parallelism`'s option of that name.
        reproducible_dropout, sequence_parallel, check_replicas_every: defaults of the options of
            these names.
        ddp: `DistributedModel` averages gradients over data-parallel ranks.
        shard_optimizer_state: with `ddp`, it also shards parameters, gradients and optimizer
            states over them (FSDP2).
        optimize: `"speed"` or `"memory"`; both run the same code.
        pipeline_parallel_degree, microbatches: 1, kept so that old configurations are understood.
    """

    tensor_parallel_degree: int = 1
    prescaled_batch: bool = False
    placement_strategy: str = "cluster"
    delayed_parameter_initialization: bool = False
    reproducible_dropout: bool = False
    sequence_parallel: bool = False
    check_replicas_every: int = 0
    ddp: bool = False
    shard_optimizer_state: bool = False
    optimize: str = "speed"
    pipeline_parallel_degree: int = 1
    microbatches: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)
        if self.tensor_parallel_degree < 1:
            raise ValueError(
                f"tensor_parallel_degree = {self.tensor_parallel_degree}, required: at least 1"
            )
        if self.check_replicas_every < 0:
            raise ValueError(
                f"check_replicas_every = {self.check_replicas_every}, required: 0 or more"
            )
        for name, advice in _ONLY_ONE.items():
            if (value := getattr(self, name)) != 1:
                raise ValueError(f"{name} = {value}, required: 1; {advice}")
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} = {value!r}, required: one of {sorted(allowed)}")

    @property
    def data_parallel(self) -> Literal["fsdp", "replicate"] | None:
        """What `DistributedModel` does by default about data-parallel ranks."""
        if not self.ddp:
            return None
        return "fsdp" if self.shard_optimizer_state else "replicate"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Config:
        """Read a configuration dict; raises ValueError naming every key that is not known."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(mapping) - set(known)):
            raise ValueError(f"unknown keys {unknown} in config, required: some of {known}")
        return cls(**mapping)


def _check_type(name: str, value: object, default: object) -> None:
    allowed = type(default)
    if not isinstance(value, allowed) or (allowed is int and isinstance(value, bool)):
        raise ValueError(
            f"{name} = {value!r} ({type(value).__name__}), required: {allowed.__name__}"
        )
