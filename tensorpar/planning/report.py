"""A plan as text: what one rank holds, computes and sends, and which degrees fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tensorpar.planning.step import Figures

#: rows of the table, in order, and the bars of the chart.
MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations kept for backward",
}


def lines(figures: Figures) -> Iterator[str]:
    """One rank's figures."""
    yield f"{'per rank (the one that holds most)':38}{'bytes':>22}"
    for name, title in MEMORY.items():
        yield _row(title, getattr(figures, name))
    yield _row("peak of a step", figures.peak)
    yield ""
    yield f"{'per rank and step':38}{'calls':>8}{'bytes':>24}"
    for kind, sent in figures.sent.items():
        yield f"{kind:38}{sent.num_calls:8,}{sent.num_bytes:16,}{readable(sent.num_bytes):>10}"
    yield f"{'floating-point operations':38}{figures.flop:24,}"
    for note in figures.notes:
        yield f"note: {note}"


def degrees(plans: Mapping[int, Figures], memory: int) -> Iterator[str]:
    """Which tensor-parallel degrees fit a rank's memory, and the smallest."""
    yield f"{'tp':>4}{'parameters':>13}{'peak':>11}   of {readable(memory)}"
    for degree, figures in plans.items():
        fits = "fits" if figures.peak <= memory else "does not fit"
        parameters, peak = readable(figures.parameters), readable(figures.peak)
        yield f"{degree:4}{parameters:>13}{peak:>11}   {figures.peak / memory:.0%}, {fits}"
    fitting = [degree for degree, figures in plans.items() if figures.peak <= memory]
    if fitting:
        yield f"the smallest of these degrees that fits: {min(fitting)}"
    else:
        yield (
            "none of these degrees fits; what needs less: fewer rows, --gradient-checkpointing, a "
            "smaller --dtype, --data-parallel fsdp with a larger --dp"
        )


def readable(num_bytes: float) -> str:
    """Decimal units: `1.53 GB`."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"


def _row(title: str, num_bytes: int) -> str:
    return f"{title:41}{num_bytes:19,}{readable(num_bytes):>10}"
