"""Which layout a parameter has, told by its key alone: no model, no ranks.

The registered plans say where state dicts keep instances of the annotated classes (`Plan.at`); a
key that ends with such a place, a child's name and a parameter's name has that parameter's layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tensorpar.families import FAMILIES
from tensorpar.registry import plans
from tensorpar.styles import Layout, Style

#: the names under which configs count attention heads; the first is Transformers' own for all.
_HEADS = ("num_attention_heads", "n_head", "num_heads")


def family_of(config: Any) -> str:
    """The family of a model: its config's `model_type`.

    Args:
        config: a Transformers config, or a mapping such as the content of `config.json`.

    Raises:
        ValueError: there is none, or no such family is known.
    """
    family = setting(config, "model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"config.model_type = {family!r}, required: one of {sorted(FAMILIES)}; other models "
            "have no table of their own"
        )
    return str(family)


def num_heads(config: Any) -> int:
    """The number of attention heads; raises ValueError where the config does not tell it."""
    heads = setting(config, *_HEADS)
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(
            f"number of attention heads = {heads!r}, required: a positive integer under one of "
            f"{list(_HEADS)} in the config"
        )
    return heads


def ends_with(key: str, place: str) -> bool:
    """Whether the dotted `key` ends with the dotted `place`, whose `*` is any one part."""
    parts, wanted = key.split("."), place.split(".")
    tail = parts[-len(wanted) :]
    return len(tail) == len(wanted) and all(
        want in ("*", part) for want, part in zip(wanted, tail, strict=True)
    )


class Entry(NamedTuple):
    """What is known of one parameter.

    Attributes:
        layout: its pattern and the axis that is cut.
        sizes: lengths of the axes `b` and, if the config is known, `h`.
    """

    layout: Layout
    sizes: Mapping[str, int]


class Layouts:
    """The layouts of one family's parameters, found by key.

    Args:
        family: Transformers' `model_type`.
        heads: the number of attention heads. Only the way from Hugging Face's layout needs it; on
            the way back it is checked if given.
    """

    def __init__(self, family: str, heads: int | None = None) -> None:
        # the most telling place first: "mlp.c_proj.weight" before "c_proj.weight"
        self._entries = sorted(_entries(family, heads), key=lambda pair: -pair[0].count("."))

    def find(self, key: str) -> Entry | None:
        """The entry of a parameter; None if no plan touches it, so that it has one layout only."""
        return next((entry for place, entry in self._entries if ends_with(key, place)), None)

    def misfits(
        self, ours: Mapping[str, torch.Tensor], shown: Mapping[str, torch.Tensor]
    ) -> list[str]:
        """A line for every tensor whose shape is not that of its layout.

        Args:
            ours: tensors in tensorpar layout.
            shown: the tensors whose shapes the caller knows, under the same names.
        """
        lines = []
        seen: dict[tuple[str, str], tuple[str, int]] = {}
        for key, tensor in ours.items():
            if (entry := self.find(key)) is None:
                continue
            axes = entry.layout.pattern.right_axes
            wrong = _misfit(key, tensor, entry, axes, seen)
            if wrong:
                shape = tuple(shown[key].shape)
                lines.append(f"{key} has shape {shape}, required axes {axes} with {wrong}")
        return lines


def _misfit(
    key: str,
    tensor: torch.Tensor,
    entry: Entry,
    axes: list[str],
    seen: dict[tuple[str, str], tuple[str, int]],
) -> str:
    """What does not fit, or nothing. `seen` has the axes of a child's other parameters."""
    if tensor.ndim != len(axes):
        return f"{len(axes)} dims in tensorpar layout"
    module = key.rpartition(".")[0]
    for axis, size in zip(axes, tensor.shape, strict=True):
        if size != entry.sizes.get(axis, size):
            return f"{axis} = {entry.sizes[axis]}"
        other, its_size = seen.setdefault((module, axis), (key, size))
        if size != its_size:
            return f"{axis} = {its_size} as in {other}"
    return ""


def _entries(family: str, heads: int | None) -> Iterator[tuple[str, Entry]]:
    for plan in plans(f"{FAMILIES[family]}."):
        for place, attributes in plan.at.items():
            stand_in = SimpleNamespace(**attributes)
            for child, style in plan.children.items():
                sizes = _sizes(style, stand_in, heads)
                for parameter, layout in style.layouts.items():
                    parts = (place, child, parameter)
                    yield ".".join(part for part in parts if part), Entry(layout, sizes)


def _sizes(style: Style, stand_in: Any, heads: int | None) -> dict[str, int]:
    """As for a module, which is not at hand: `stand_in` has the attributes its place tells."""
    sizes = {"b": style.blocks(stand_in) if callable(style.blocks) else style.blocks}
    if style.heads and heads is not None:
        sizes["h"] = heads
    return sizes


def setting(config: Any, *names: str) -> Any:
    """What a Transformers config, or a mapping, has under the first of `names` that it has."""
    if isinstance(config, Mapping):
        return next((config[name] for name in names if name in config), None)
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)
