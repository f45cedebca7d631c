"""Axis patterns: a change of layout as one line that can be read in both directions.

`"i (b h d) -> b h d i"` takes Hugging Face's fused `[in, 3 * heads * head_dim]` weight apart; read
from right to left it puts it together again. Nobody writes an inverse by hand. A pattern never
splits across ranks and never touches a name: those are other rooms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import EinopsError, rearrange


@dataclass(frozen=True)
class Pattern:
    """A bijection between two layouts of one tensor, in einops notation.

    Args:
        text: `"left -> right"`; both sides name the same axes, each once. Parentheses join axes
            into one dim, the leftmost varying slowest.

    Raises:
        ValueError: the sides do not name the same axes, or the notation is not a bijection
            (repeated axes, `1`, or an ellipsis).
    """

    text: str

    def __post_init__(self) -> None:
        if self.text.count("->") != 1:
            raise ValueError(f"pattern = {self.text!r}, required: exactly one '->'")
        left, right = (_axis_names(side) for side in self._sides)
        if sorted(left) != sorted(right) or len(set(left)) != len(left):
            raise ValueError(
                f"pattern = {self.text!r}, required: the same axes on both sides, each once; "
                f"left has {left}, right has {right}"
            )
        if bad := [name for name in left if not name.isidentifier()]:
            raise ValueError(f"pattern = {self.text!r} has {bad}, required: named axes only")

    @cached_property
    def _sides(self) -> tuple[str, str]:
        left, _, right = self.text.partition("->")
        return left.strip(), right.strip()

    @property
    def inverse(self) -> Pattern:
        """The same pattern read from right to left."""
        left, right = self._sides
        return Pattern(f"{right} -> {left}")

    @property
    def unjoined(self) -> Pattern:
        """The same with every axis of the left side a dim of its own.

        Where the right side joins none either, both it and its inverse only permute, so they give
        views of any tensor.
        """
        left, right = self._sides
        return Pattern(f"{' '.join(_axis_names(left))} -> {right}")

    @property
    def left_axes(self) -> list[str]:
        """The names of the left side's axes, in order, whether joined or not."""
        return _axis_names(self._sides[0])

    @property
    def right_axes(self) -> list[str]:
        """The names of the right side's dims, in order; joined axes keep their parentheses."""
        return self._sides[1].replace("( ", "(").split()

    def apply(self, tensor: torch.Tensor, **sizes: int) -> torch.Tensor:
        """Rearrange `tensor` from the left layout to the right one, as a view where one exists.

        Args:
            tensor: any dtype and device, in the left layout.
            sizes: lengths of axes that the left side joins and that cannot be inferred. Axes the
                pattern does not name are ignored, so one mapping serves all tensors of a layer.

        Raises:
            ValueError: shape and sizes do not fit; the message has the pattern, the shape and the
                sizes.
        """
        if self._sides[0] == self._sides[1]:
            return tensor
        needed = {name: size for name, size in sizes.items() if name in self._joined_left}
        try:
            return rearrange(tensor, self.text, **needed)
        except (EinopsError, RuntimeError) as error:
            raise ValueError(
                f"shape = {tuple(tensor.shape)} does not fit {self.text!r} with {needed}: "
                f"{str(error).strip().splitlines()[-1].strip()}"
            ) from None

    @cached_property
    def _joined_left(self) -> frozenset[str]:
        """Axes inside parentheses on the left: the only ones whose length may be given."""
        names: set[str] = set()
        for group in self._sides[0].split("(")[1:]:
            names.update(group.split(")")[0].split())
        return frozenset(names)


def _axis_names(side: str) -> list[str]:
    return side.replace("(", " ").replace(")", " ").split()
