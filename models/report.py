"""What the runner measured, as tables for a terminal."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import median
from typing import Any

from rich.table import Table as Grid

from .task import Results, Run, Table, Task, seconds_per_step


def middle(values: list[float]) -> str:
    """The median of the runs that did not diverge."""
    finite = [value for value in values if math.isfinite(value)]
    return f"{median(finite):.3g}" if finite else "-"


def spread(values: list[float]) -> str:
    """The median and, of several values, the range; how many runs diverged."""
    finite = [value for value in values if math.isfinite(value)]
    parts = [middle(finite)] if finite else []
    if len(finite) > 1:
        parts[0] += f" ({min(finite):.3g}-{max(finite):.3g})"
    if len(finite) < len(values):
        parts.append(f"{len(values) - len(finite)} diverged")
    return ", ".join(parts)


def distance(first: Run, second: Run) -> float:
    """How far two learning curves are apart: the mean over epochs of the losses' difference."""
    pairs = zip(first.history["loss"], second.history["loss"], strict=False)
    gaps = [abs(a - b) for a, b in pairs]
    return sum(gaps) / len(gaps)


def _grid(title: str, *columns: str, caption: str | None = None) -> Grid:
    grid = Grid(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, name in enumerate(columns):
        grid.add_column(name, justify="right" if index else "left", no_wrap=True)
    return grid


def tables(task: Task[Any], results: Results) -> list[Grid]:
    """All that there is to show of the results."""
    found = (
        experiment_table(results.table) if results.table else None,
        metric_table(task, results),
        ops_table(task, results),
    )
    return [grid for grid in found if grid is not None]


def metric_table(task: Task[Any], results: Results) -> Grid:
    """What the book leads to expect, and what came out."""
    ops = results.runs[0].ops
    metric = f"{task.metric} ({task.unit})" if task.unit else task.metric
    columns = (
        "network",
        "weights",
        "expected",
        f"test\n{metric}",
        f"train\n{task.metric}",
        "µs/step",
    )
    caption = "Median and range over seeds, after the last epoch."
    grid = _grid(f"{task.title}, {ops} ops", *columns, caption=caption)
    for variant in dict.fromkeys(run.variant for run in results.runs):
        runs = results.select(variant, ops)
        grid.add_row(
            variant,
            f"{runs[0].parameters:,}",
            task.expected.get(variant, "-"),
            spread([run.final(f"test_{task.metric}") for run in runs]).replace(", ", "\n"),
            middle([run.final(f"train_{task.metric}") for run in runs]),
            f"{1e6 * seconds_per_step(runs):.0f}",
        )
    return grid


def ops_table(task: Task[Any], results: Results) -> Grid | None:
    """Our ops against PyTorch's: time per step, metric, and how near the learning curves are.

    Curves of different rounding drift apart, so their distance is set against the distance
    between curves of different seeds.
    """
    variants = dict.fromkeys(run.variant for run in results.runs if run.ops == "torch")
    if not variants or results.runs[0].ops == "torch":
        return None
    used = sorted(
        {name for run in results.runs if run.ops != "torch" for name in run.implementations}
    )
    grid = _grid(
        "Our ops and PyTorch's, trained in turn epoch by epoch",
        *("network", "ours\nµs/step", "PyTorch\nµs/step", "speed"),
        *(f"ours\n{task.metric}", f"PyTorch\n{task.metric}", "curves apart\nops/seeds"),
        caption=f"Test {task.metric}, median over seeds. Curves apart: mean difference of the "
        "training loss by epoch, between the two sets of ops, and between two seeds with ours. "
        f"Ours: {', '.join(used)}.",
    )
    for variant in variants:
        grid.add_row(variant, *_ops_row(task, results, variant))
    return grid


def _ops_row(task: Task[Any], results: Results, variant: str) -> list[str]:
    ours, theirs = (results.select(variant, ops) for ops in ("udlkernels", "torch"))
    pairs = list(zip(ours, theirs, strict=True))
    ratios = [
        b / a
        for first, second in pairs
        for a, b in zip(*(run.history["seconds_per_step"] for run in (first, second)), strict=False)
    ]
    apart = median(distance(*pair) for pair in pairs)
    seeds = [distance(*pair) for pair in combinations(ours, 2)]
    metrics = ([run.final(f"test_{task.metric}") for run in runs] for runs in (ours, theirs))
    return [
        *(f"{1e6 * seconds_per_step(runs):.0f}" for runs in (ours, theirs)),
        f"{median(ratios):.2f}x",
        *(middle(values) for values in metrics),
        f"{apart:.3f}/" + (f"{median(seeds):.3f}" if seeds else "-"),
    ]


def experiment_table(table: Table) -> Grid:
    grid = _grid(table.title, *table.columns, caption=table.caption)
    for row in table.rows:
        grid.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    return grid
