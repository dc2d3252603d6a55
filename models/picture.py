"""What the pictures of the models share: one look, and curves with the spread over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from statistics import median
from typing import TYPE_CHECKING, Any

from .task import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue, orange, green, red, grey: told apart by the colour-blind too.
COLOURS = ("#1f6fb4", "#e08a00", "#2e8b57", "#c8385a", "#6b6b6b")


def panels(*titles: str) -> tuple[Figure, list[Axes]]:
    """A row of square axes with light grids."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(titles), 4.2), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=11, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, list(axes)


def by_epoch(runs: Iterable[Run], name: str) -> list[list[float]]:
    """For each epoch the values of all runs that reached it."""
    rows = zip_longest(*(run.history[name] for run in runs))
    return [[value for value in row if value is not None] for row in rows]


def curve(ax: Axes, runs: Iterable[Run], name: str, band: bool = False, **line: Any) -> None:
    """The median over runs by epoch; with `band` also the range from the least to the largest."""
    rows = by_epoch(runs, name)
    epochs = list(range(1, len(rows) + 1))
    ax.plot(epochs, [median(row) for row in rows], **line)
    if band:
        low, high = [min(row) for row in rows], [max(row) for row in rows]
        ax.fill_between(epochs, low, high, color=line.get("color"), alpha=0.15, linewidth=0)
