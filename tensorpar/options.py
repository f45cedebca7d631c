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
    """

    enabled: bool = True
    check_batches: bool = True
    delayed_parameter_initialization: bool = False
    fused_attention: bool = True

    @classmethod
    def of(cls, enabled: bool, given: dict[str, Any], **defaults: Any) -> Options:
        """Options from keyword arguments; ValueError names those that are not known."""
        known = [field.name for field in fields(cls) if field.name != "enabled"]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"unknown options {unknown}, required: some of {known}")
        for name, value in given.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} = {value!r}, required: True or False")
        return cls(enabled=enabled, **{**defaults, **given})


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
