"""Ratios as bars, in a PNG beside the figures."""

from __future__ import annotations

from collections.abc import Mapping

from contest import RESULTS


def bars(ratios: Mapping[str, Mapping[str, float]], name: str, title: str) -> None:
    """One group of bars per key, one bar per contestant; 1 is a line."""
    import matplotlib.pyplot as plt

    systems = list(dict.fromkeys(system for row in ratios.values() for system in row))
    figure, axes = plt.subplots(figsize=(1.8 + 1.6 * len(ratios), 4))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        there = [(at, row[system]) for at, row in enumerate(ratios.values()) if system in row]
        places = [at + (number - (len(systems) - 1) / 2) * width for at, _ in there]
        drawn = axes.bar(places, [value for _, value in there], width, label=system)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(ratios)), list(ratios))
    axes.set_ylabel("ratio, less is faster")
    axes.set_title(title)
    axes.legend(fontsize=8, ncols=len(systems))
    axes.margins(y=0.15)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"drawn to {path}")
