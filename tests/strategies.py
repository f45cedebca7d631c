"""What hypothesis draws, for all tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from tests.families import FamilyCase

dtypes = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
"""What checkpoints are kept in."""


def world_sizes(largest: int = 8) -> st.SearchStrategy[int]:
    """Tensor-parallel degrees; most divide no size of a tiny model."""
    return st.integers(1, largest)


@st.composite
def tiny_configs(draw: st.DrawFn, case: FamilyCase) -> Any:
    """Configs of one family, small enough that a model costs milliseconds."""
    return case.config(
        layers=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 6)),
        head_size=draw(st.integers(1, 4)),
        inner=draw(st.integers(1, 17)),
        vocab=draw(st.integers(1, 23)),
        positions=draw(st.integers(1, 5)),
        **draw(st.sampled_from(case.variants)),
    )


@st.composite
def axis_sizes(draw: st.DrawFn, axes: list[str], smallest: int = 0) -> dict[str, int]:
    """A length for every named axis."""
    return {axis: draw(st.integers(smallest, 4)) for axis in axes}
