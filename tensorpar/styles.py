"""How one child of a module is sharded, said as data.

A style names the pattern from Hugging Face's axes to ours and the axis that is cut. From that one
statement follow the layer (`parallelize`), its shards (`partition`) and both directions of
translation. Axis names: `b` fused blocks (q|k|v), `h` heads, `d` head size, `i` input features,
`o` output features, `v` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from tensorpar.pattern import Pattern

#: a number that a row may state, or compute from the module (or its stand-in) it annotates.
Count = int | Callable[[Any], int]
#: which side the weight stores first: torch's Linear is "oi", Hugging Face's Conv1D "io".
Stored = Literal["oi", "io"]


@dataclass(frozen=True)
class Layout:
    """One parameter's layout: the pattern from HF's axes to ours, and the axis that is cut.

    Attributes:
        pattern: its left side is what Hugging Face saves.
        cut: the name of the sharded axis on the right side; None for a replicated parameter.
    """

    pattern: Pattern
    cut: str | None

    @property
    def shard_dim(self) -> int | None:
        """The dim of our tensor that is sharded; None where it is replicated."""
        return None if self.cut is None else self.pattern.right_axes.index(self.cut)


@cache
def layout(text: str, cut: str | None) -> Layout:
    """The `Layout` of a pattern's text; one object per distinct text."""
    return Layout(Pattern(text), cut)


def _join(axes: str) -> str:
    return f"({axes})" if " " in axes else axes


@dataclass(frozen=True)
class Column:
    """A linear layer whose output features are sharded.

    Args:
        blocks: fused projections in one weight, e.g. 3 for q|k|v; each is cut alike.
        heads: the annotated module's attribute that counts heads (dots lead into children), if the
            cut must fall between heads.
        stored: `"io"` for Hugging Face's Conv1D.
        optional: the child may be absent.
        interleaved: the blocks alternate within each head, rather than follow each other.
        formerly: the child's name in older versions of its library.
    """

    blocks: Count = 1
    heads: str | None = None
    stored: Stored = "oi"
    optional: bool = False
    interleaved: bool = False
    formerly: str | None = None

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """The layout of each parameter of the child, by name."""
        axes, cut = ("h d", "h") if self.heads else ("o", "o")
        if self.blocks != 1:
            axes = "h b d" if self.interleaved else f"b {axes}"
        joined = _join(axes)
        weight = f"{joined} i" if self.stored == "oi" else f"i {joined}"
        return {
            "weight": layout(f"{weight} -> {axes} i", cut),
            "bias": layout(f"{joined} -> {axes}", cut),
        }


@dataclass(frozen=True)
class Row:
    """A linear layer whose input features are sharded; its output is summed over ranks.

    Args:
        heads: as for `Column`.
        stored: `"io"` for Hugging Face's Conv1D.
        optional: the child may be absent.
        partial: leave the sum over ranks to the annotated module, which has a `mixin` for it.
        formerly: the child's name in older versions of its library.
    """

    heads: str | None = None
    stored: Stored = "oi"
    optional: bool = False
    partial: bool = False
    blocks: Count = 1
    formerly: str | None = None

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """The layout of each parameter of the child, by name."""
        axes, cut = ("h d", "h") if self.heads else ("i", "i")
        joined = _join(axes)
        weight = f"o {joined}" if self.stored == "oi" else f"{joined} o"
        return {"weight": layout(f"{weight} -> o {axes}", cut), "bias": layout("o -> o", None)}


@dataclass(frozen=True)
class VocabParallel:
    """An embedding, or a linear head, whose tokens are sharded.

    Args:
        optional: the child may be absent.
        formerly: the child's name in older versions of its library.
    """

    optional: bool = False
    heads: str | None = None
    blocks: Count = 1
    formerly: str | None = None

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """The layout of each parameter of the child, by name."""
        return {"weight": layout("v i -> v i", "v"), "bias": layout("v -> v", "v")}


@dataclass(frozen=True)
class OwnParameter:
    """Not a child but a parameter of the annotated module itself, sharded.

    Its module's forward must not read it whole; it is for parameters tied to a sharded child's.

    Args:
        pattern: from Hugging Face's axes to ours.
        cut: the name of the sharded axis.
    """

    pattern: str
    cut: str
    optional: bool = False
    heads: str | None = None
    blocks: Count = 1

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """One layout, under the empty name: there is no parameter below this one."""
        return {"": layout(self.pattern, self.cut)}


Style = Column | Row | VocabParallel | OwnParameter
