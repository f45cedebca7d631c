"""The engine of hand-written tables: Hugging Face's layout to smdistributed's and back.

Both directions read the same rules. Every key is accounted for: a rule takes it, it is dropped on
purpose, it lies outside the trunk and passes through, or the error names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .problems import refuse
from .table import Rule, Side, Table, filled, tables
from .tensors import StateDict


@dataclass(frozen=True)
class Match:
    """What a table makes of a state dict's keys.

    Attributes:
        rules: filled rules all of whose keys are there.
        others: keys that pass through.
        problems: a line for each key that is missing, unknown or in the way of another.
    """

    rules: list[Rule]
    others: list[str]
    problems: list[str]


def is_smdistributed(keys: Iterable[str]) -> bool:
    """Whether these are the keys of smdistributed's layout, rather than of the other two."""
    marks = (".seq_layers.", ".attention.query.")
    return any(key == "word_embedding.weight" or any(m in key for m in marks) for key in keys)


def match(table: Table, keys: Iterable[str], side: Side, *, strict: bool = True) -> Match:
    """Find the rule of every key; `table` must be the fitting one of its variants.

    Without `strict` keys that nobody knows pass through.
    """
    if not table.rules:
        others = sorted(one.family for one in tables())
        return Match([], [], [f"smdistributed has no layout for it, only for {others}"])
    given = dict.fromkeys(keys)
    layers = table.layer_numbers(given, side)
    if gaps := sorted(set(range(max(len(layers), 1))) - layers):
        told = f"layers {gaps} have no keys" if layers else "no key belongs to a layer"
        return Match([], [], [told])
    rules, problems = [], []
    for group, required in [(table.rules, True), *((extra, False) for extra in table.extras)]:
        wanted = list(filled(group, len(layers)))
        if required or any(key in given for one in wanted for key in one.keys(side)):
            missing = [key for one in wanted for key in one.keys(side) if key not in given]
            problems += [f"{key} is missing" for key in missing]
            rules += wanted
    known = {key for one in rules for key in one.keys(side)}
    made = {key for one in rules for key in one.keys("smd" if side == "hf" else "hf")}
    others = [key for key in given if key not in known and not table.drops(key)]
    for key in others:
        if strict and key.startswith(table.trunk(side)):
            problems.append(f"{key} is unknown")
        elif key in made:
            problems.append(f"{key} is in the way of a translated key")
    return Match(rules, others, problems)


def from_hf(table: Table, hf: StateDict, *, strict: bool = True) -> StateDict:
    """Hugging Face's layout to smdistributed's; unknown keys pass through without `strict`.

    Raises:
        ValueError: all keys that are missing, unknown or of the wrong shape.
    """
    table = table.fitting(hf, "hf")
    found = match(table, hf, "hf", strict=strict)
    refuse(_what(table, "hf"), found.problems or _headless(table, hf))
    smd: StateDict = {}
    problems = []
    for one in found.rules:
        try:
            ours = one.pattern.apply(hf[one.hf], b=len(one.smd))
        except ValueError as error:
            problems.append(f"{one.hf}: {error}")
            continue
        parts = [ours] if len(one.smd) == 1 else ours.unbind(0)
        smd.update(zip(one.smd, parts, strict=True))
    for one, _, required in misfits(table, found.rules, smd):
        problems.append(f"{one.hf} has shape {tuple(hf[one.hf].shape)}, required {required}")
    refuse(_what(table, "hf"), problems)
    smd.update({key: hf[key] for key in found.others})
    return _tied(table, smd, "smd")


def to_hf(table: Table, smd: StateDict, *, strict: bool = True) -> StateDict:
    """smdistributed's layout to Hugging Face's; unknown keys pass through without `strict`.

    Raises:
        ValueError: all keys that are missing, unknown or of the wrong shape.
    """
    table = table.fitting(smd, "smd")
    found = match(table, smd, "smd", strict=strict)
    refuse(_what(table, "smd"), found.problems)
    problems = [
        f"{key} has shape {tuple(smd[key].shape)}, required {required}"
        for _, key, required in misfits(table, found.rules, smd)
    ]
    problems += [
        f"{', '.join(one.smd)} are {sorted(map(str, kinds))}, required: one dtype and device"
        for one in found.rules
        if len(kinds := {(smd[key].dtype, smd[key].device) for key in one.smd}) > 1
    ]
    refuse(_what(table, "smd"), problems)
    hf: StateDict = {}
    for one in found.rules:
        parts = [smd[key] for key in one.smd]
        theirs = parts[0] if len(parts) == 1 else torch.stack(parts)
        hf[one.hf] = one.pattern.inverse.apply(theirs)
    hf.update({key: smd[key] for key in found.others})
    return _tied(table, hf, "hf")


def misfits(
    table: Table, rules: Iterable[Rule], smd: Mapping[str, torch.Tensor]
) -> list[tuple[Rule, str, str]]:
    """Rule, smdistributed key and requirement of every tensor whose shape is not like the others'.

    An axis has one length in the whole model: that which most tensors have.
    """
    held = [(one, key, smd[key].shape) for one in rules for key in one.smd if key in smd]
    votes: dict[str, Counter[int]] = {}
    for one, _, shape in held:
        for axis, size in zip(one.smd_axes, shape, strict=False):
            votes.setdefault(table.same.get(axis, axis), Counter())[size] += 1
    winners = {axis: sizes.most_common(1)[0][0] for axis, sizes in votes.items()}
    wrong = []
    for one, key, shape in held:
        sizes = {axis: winners.get(table.same.get(axis, axis)) for axis in one.smd_axes}
        if list(shape) != list(sizes.values()):
            told = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
            wrong.append((one, key, f"{one.pattern.text!r} with {told}, as other keys have it"))
    return wrong


def _headless(table: Table, hf: StateDict) -> list[str]:
    """A line if smdistributed's keys would not tell whether Hugging Face's have the prefix."""
    if table.smd_prefix or table.tied or not all(key.startswith(table.hf_prefix) for key in hf):
        return []
    return [
        f"lm_head.weight is missing, or another head, or keys without {table.hf_prefix!r} in front"
    ]


def _what(table: Table, side: Side) -> str:
    if side == "hf":
        return f"this is not a Hugging Face state dict of {table.family}"
    return (
        f"this is not a full smdistributed state dict of {table.family} (partial ones are "
        "translated as a list of all tensor-parallel ranks' dicts)"
    )


def _tied(table: Table, out: StateDict, side: Side) -> StateDict:
    """Write the word embedding under the head's name too, where the model has such a head."""
    if side in table.tied and not any(key.startswith(table.other_heads) for key in out):
        source, copy = table.tied[side]
        out.setdefault(copy, out[source])
    return out
