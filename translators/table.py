"""A family's table: by which rules its Hugging Face keys become smdistributed's and come back.

A rule is one line of data and is read in both directions. Nothing here touches a tensor's values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Literal

from tensorpar.families import FAMILIES
from tensorpar.pattern import Pattern

from .layouts import ends_with
from .masks import Masks

Side = Literal["hf", "smd"]


@dataclass(frozen=True)
class Rule:
    """How one Hugging Face tensor is kept by smdistributed.

    Attributes:
        hf: its key; `{i}` stands for each layer, `{last}` for the last one.
        smd: the key or keys that smdistributed has for it.
        pattern: from Hugging Face's axes to smdistributed's. With several keys its right side
            begins with `b`, and each key has one slice of that axis.
        row_bias: a bias added once after the sum over ranks: only the first rank's file has it.
    """

    hf: str
    smd: tuple[str, ...]
    pattern: Pattern
    row_bias: bool = False

    def keys(self, side: Side) -> tuple[str, ...]:
        """The keys of this rule on one side."""
        return (self.hf,) if side == "hf" else self.smd

    @property
    def smd_axes(self) -> list[str]:
        """The axes of the tensor under each of smdistributed's keys."""
        return self.pattern.right_axes[len(self.smd) > 1 :]

    def renamed(self, hf: str, smd: Iterable[str]) -> Rule:
        """The same rule for other keys."""
        return replace(self, hf=hf, smd=tuple(smd))


def rule(hf: str, smd: str, pattern: str) -> Rule:
    """A rule of one key on each side."""
    return Rule(hf, (smd,), Pattern(pattern))


def pair(
    hf: str, smd: str | Sequence[str], weight: str, bias: str, *, row: bool = False
) -> tuple[Rule, Rule]:
    """The rules of a module's weight and bias.

    Args:
        hf: the module's path.
        smd: the path or paths of smdistributed's modules.
        weight: the weight's pattern.
        bias: the bias's pattern.
        row: whether the layer is row parallel, so that only the first rank's file has its bias.
    """
    paths = [smd] if isinstance(smd, str) else smd

    def of(name: str, pattern: str) -> Rule:
        return Rule(f"{hf}.{name}", tuple(f"{path}.{name}" for path in paths), Pattern(pattern))

    return of("weight", weight), replace(of("bias", bias), row_bias=row)


@dataclass(frozen=True)
class Table:
    """All that is known of a family beside the registered plans.

    Attributes:
        family: Transformers' `model_type`.
        rules: those whose keys a model must have; none if smdistributed had no layout for it.
        extras: groups of rules; if a model has one key of a group, it must have all.
        hf_prefix: what Hugging Face's base model, saved on its own, has not in front of its keys.
        smd_prefix: the same of smdistributed's.
        hf_trunk: beginnings of Hugging Face's keys that no key may have without a rule.
        smd_trunk: the same of smdistributed's.
        tied: by side, the word embedding's key and that of the head which shares it.
        other_heads: beginnings of keys which tell that a model has no such head.
        cut: axes of which smdistributed's partial files hold slices.
        same: axes that have the same length as another.
        masks: the causal masks that old versions kept.
        dropped: ends of the keys of other buffers that old versions kept.
    """

    family: str
    rules: tuple[Rule, ...]
    extras: tuple[tuple[Rule, ...], ...] = ()
    hf_prefix: str = "transformer."
    smd_prefix: str = ""
    hf_trunk: tuple[str, ...] = ("transformer.",)
    smd_trunk: tuple[str, ...] = ("transformer.", "word_embedding.", "position_embedding.")
    tied: Mapping[Side, tuple[str, str]] = field(default_factory=dict)
    other_heads: tuple[str, ...] = ("score.", "classifier.", "qa_outputs.")
    cut: tuple[str, ...] = ("a", "f")
    same: Mapping[str, str] = field(default_factory=lambda: {"a": "h"})
    masks: Masks | None = None
    dropped: tuple[str, ...] = ()

    def trunk(self, side: Side) -> tuple[str, ...]:
        """Beginnings of keys that no key may have without a rule."""
        return self.hf_trunk if side == "hf" else self.smd_trunk

    def drops(self, key: str) -> bool:
        """Whether this is a buffer of old versions, which holds nothing the model does not know."""
        is_mask = self.masks is not None and self.masks.has(key)
        return is_mask or any(ends_with(key, place) for place in self.dropped)

    def fitting(self, keys: Iterable[str], side: Side) -> Table:
        """This table, or the one of the base model alone if `keys` are such a model's."""
        prefix = self.hf_prefix if side == "hf" else self.smd_prefix
        if prefix:
            is_base = not any(key.startswith(prefix) for key in keys)
        else:
            is_base = all(key.startswith(self.smd_trunk) for key in keys)
        return self._base_model() if is_base else self

    def _base_model(self) -> Table:
        def bare(one: Rule) -> Rule:
            smd = (key.removeprefix(self.smd_prefix) for key in one.smd)
            return one.renamed(one.hf.removeprefix(self.hf_prefix), smd)

        return replace(
            self,
            rules=tuple(map(bare, self.rules)),
            extras=tuple(tuple(map(bare, group)) for group in self.extras),
            hf_trunk=tuple(key.removeprefix(self.hf_prefix) for key in self.hf_trunk),
            smd_trunk=tuple(key.removeprefix(self.smd_prefix) for key in self.smd_trunk),
            tied={},
        )

    def layers_only(self) -> Table:
        """The table of models of which only the layers were distributed.

        Such a model keeps Hugging Face's containers, and all that is not in a layer.
        """
        smd, hf = self._layers("smd"), self._layers("hf")

        def layer_rules(group: Iterable[Rule]) -> tuple[Rule, ...]:
            return tuple(
                one.renamed(one.hf, (key.replace(smd, hf) for key in one.smd))
                for one in group
                if "{i}" in one.hf
            )

        groups = (layer_rules(group) for group in self.extras)
        return replace(
            self,
            rules=layer_rules(self.rules),
            extras=tuple(group for group in groups if group),
            smd_prefix=self.hf_prefix,
            hf_trunk=(hf,),
            smd_trunk=(hf,),
            tied={},
        )

    def layer_numbers(self, keys: Iterable[str], side: Side) -> set[int]:
        """The layers that `keys` belong to."""
        layer = re.compile(rf"{re.escape(self._layers(side))}(\d+)\.")
        return {int(found[1]) for key in keys if (found := layer.match(key))}

    def _layers(self, side: Side) -> str:
        """What the keys of all layers begin with, up to the layer's number."""
        keys = (key for one in self.rules for key in one.keys(side) if "{i}" in key)
        return next(keys).partition("{i}")[0]


def filled(rules: Iterable[Rule], num_layers: int) -> Iterator[Rule]:
    """Rules with their placeholders filled: each rule of a layer once for every layer."""
    for one in rules:
        for i in range(num_layers) if "{i}" in one.hf else [0]:
            numbers = {"i": i, "last": num_layers - 1}
            yield one.renamed(one.hf.format(**numbers), (key.format(**numbers) for key in one.smd))


def table_of(family: str) -> Table:
    """The table of a family, by Transformers' `model_type`."""
    module = import_module(f".{family.replace('_', '')}", __package__)
    table: Table = module.TABLE
    return table


def tables() -> list[Table]:
    """The tables of all families that smdistributed had a layout for."""
    found = (table_of(family) for family in FAMILIES)
    return [table for table in found if table.rules]
