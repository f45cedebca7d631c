"""The options of a tensor-parallel region, and which modules they were chosen for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Options:
    """How modules are made parallel.

    Attributes:
        enabled: False leaves a module and all inside it as Hugging Face built it.
        check_batches: compare before each forward that tensor-parallel ranks are fed alike.
        delayed_parameter_initialization: parameters are born on the meta device and each rank
            fills only its own shard: the same distribution, not the same values, as without.
        fused_attention: use `scaled_dot_product_attention` where a Transformers class has no such
            path of its own (GPT-J, GPT-Neo).
        reproducible_dropout: a run with dropout on draws the masks of one process and so has its
            losses, at any degree. Slower: masks are drawn for all heads on every rank, and
            attention with dropout is computed in the open, `[batch, heads, queries, keys]`
            allocated. Defined against Transformers' eager attention, and sdpa on the CPU; refused
            with kernels whose order of draws is not known (sdpa on GPUs, flash, flex).
        sequence_parallel: in training, between the parallel regions each rank keeps some positions
            of the sequence only: the residual stream, its norms and dropout. All-gathers and
            reduce-scatters of the same volume take the place of the all-reduces. Not together
            with `reproducible_dropout`.
        gather_logits: in evaluation with labels, logits are whole on every rank. False leaves them
            as a training step does: the loss is all that is communicated for, and `logits` is a
            DTensor `Shard(-1)` whose `full_tensor()`, called on every rank, gathers them.
        check_replicas_every: every so many forwards, check that what tensor-parallel ranks must
            have in common is the same, and raise on all of them, naming what differs first; 0 for
            never.
    """

    enabled: bool = True
    check_batches: bool = True
    delayed_parameter_initialization: bool = False
    fused_attention: bool = True
    reproducible_dropout: bool = False
    sequence_parallel: bool = False
    gather_logits: bool = True
    check_replicas_every: int = 0

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.reproducible_dropout:
            raise ValueError(
                "sequence_parallel = True with reproducible_dropout = True, required: one of them; "
                "ranks that hold some positions each draw masks for these alone"
            )

    @classmethod
    def of(cls, enabled: bool, given: dict[str, Any], **defaults: Any) -> Options:
        """Options from keyword arguments.

        Raises:
            ValueError: unknown names, a negative count, or two that exclude each other.
            TypeError: a value of the wrong type.
        """
        kinds = {field.name: type(field.default) for field in fields(cls)}
        known = [name for name in kinds if name != "enabled"]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"unknown options {unknown}, required: some of {known}")
        for name, value in given.items():
            _check(name, value, kinds[name])
        return cls(enabled=enabled, **{**defaults, **given})


def _check(name: str, value: object, kind: type) -> None:
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}, required: True or False")
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} = {value!r}, required: an integer, 0 or more")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} = {value}, required: 0 or more")


def mark(module: nn.Module, options: Options) -> None:
    """Choose options for a module and what it contains; a mark further inside wins."""
    module.__dict__["_tensorpar_options"] = options


def effective(root: nn.Module, default: Options) -> dict[nn.Module, Options]:
    """The options of every module under `root`, in order: the nearest mark at or above it."""
    found: dict[nn.Module, Options] = {}
    _visit(root, default, found)
    return found


def _visit(module: nn.Module, inherited: Options, found: dict[nn.Module, Options]) -> None:
    # not a closure: one that calls itself is a cycle and would keep dropped models in memory
    if module not in found:
        found[module] = chosen = module.__dict__.get("_tensorpar_options", inherited)
        for child in module.children():
            _visit(child, chosen, found)
