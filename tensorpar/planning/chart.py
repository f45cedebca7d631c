"""A plan as a picture: what a rank holds at each degree, against its memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorpar.planning.report import MEMORY
from tensorpar.planning.step import Figures

GB = 1e9


def require_matplotlib() -> None:
    """Raise ValueError where it is not installed, before anything is computed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--chart without matplotlib, required: matplotlib; install it by "
            "pip install 'tensorpar[plan]'"
        ) from None


def draw(plans: Mapping[int, Figures], title: str, memory: int | None, file: Path) -> None:
    """Stacked bars, one a degree, a line at the memory; a PNG or what the name ends with.

    What is held at a step's peak besides the named parts is the top of a bar; the parts are not all
    at their largest at the same moment, so they may reach beyond the peak.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names = [f"tp {degree}" for degree in plans]
    bottom = [0.0] * len(names)
    for name, label in MEMORY.items():
        heights = [getattr(figures, name) / GB for figures in plans.values()]
        axes.bar(names, heights, bottom=bottom, width=0.6, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    peaks = [figures.peak / GB for figures in plans.values()]
    axes.plot(names, peaks, "k_", markersize=30, label="peak of a step")
    if memory is not None:
        axes.axhline(memory / GB, color="crimson", linestyle="--", label="memory")
    axes.set_ylabel("GB per rank")
    axes.set_title(title, fontsize="small", wrap=True)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
