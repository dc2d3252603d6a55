"""How an op's time and memory grow with the length of its input: `udlkernels bench --curve`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .declaration import DTYPE_NAMES, Benchmark, Row
from .report import Cell, duration, table
from .results import OURS, Measured
from .summary import Outcome

PHASES = ("forward", "step")


@dataclass(frozen=True)
class Curve:
    """One op over lengths, with the goals for how it grows.

    `declared` makes the declaration for a length, with one shape; its peers may differ, as where
    memory ends. The exponents are those of a power of the length, at most.
    """

    name: str
    lengths: tuple[int, ...]
    declared: Callable[[int], Benchmark]
    time_exponent: float
    memory_exponent: float

    def rows(self, dtypes: Sequence[torch.dtype] = ()) -> list[Row]:
        found = [self.declared(length) for length in self.lengths]
        return [
            Row(benchmark, benchmark.shapes[0], dtype)
            for dtype in dtypes or found[0].dtypes
            for benchmark in found
        ]


@dataclass(frozen=True)
class Fit:
    """What one contestant's time and memory are proportional to: a power of the length.

    NaN where fewer than two lengths were measured.
    """

    dtype: str
    phase: str
    contestant: str
    time: float
    memory: float


def exponent(values: Mapping[int, float]) -> float:
    """Of the power of the key that fits the values best, by least squares of the logarithms."""
    if len(values) < 2:
        return math.nan
    x, y = (np.log(np.array([*part], float)) for part in (values.keys(), values.values()))
    return float(np.polyfit(x, y, 1)[0])


def lengths(curve: Curve) -> dict[str, int]:
    """Of each shape."""
    return {curve.declared(length).shapes[0].id: length for length in curve.lengths}


def fits(curve: Curve, rows: Sequence[Measured]) -> list[Fit]:
    """Of every contestant, over the rows that count."""
    length = lengths(curve)
    found = []
    for dtype, phase in dict.fromkeys((row.dtype, row.phase) for row in rows):
        own = [row for row in rows if (row.dtype, row.phase) == (dtype, phase) and row.counts]
        for name in dict.fromkeys(name for row in own for name in (OURS, *row.peers)):
            times = {length[row.shape]: row.seconds(name) or 0.0 for row in own}
            memory = {length[row.shape]: row.memory.get(name, 0) for row in own}
            found.append(
                Fit(dtype, phase, name, exponent(_positive(times)), exponent(_positive(memory)))
            )
    return found


def outcomes(curve: Curve, rows: Sequence[Measured]) -> list[Outcome]:
    """The goals, for each type and phase: none is met where a row did not count."""
    ours = {(fit.dtype, fit.phase): fit for fit in fits(curve, rows) if fit.contestant == OURS}
    found = []
    for dtype, phase in dict.fromkeys((row.dtype, row.phase) for row in rows):
        own = [row for row in rows if (row.dtype, row.phase) == (dtype, phase)]
        counted = sum(row.counts for row in own)
        fit = ours.get((dtype, phase), Fit(dtype, phase, OURS, math.nan, math.nan))
        for what, value, goal in (
            ("time", fit.time, curve.time_exponent),
            ("peak extra memory", fit.memory, curve.memory_exponent),
        ):
            found.append(
                Outcome(
                    case=f"{curve.name} {phase} {dtype}, exponent of the {what}",
                    goal=f"at most {goal:g}",
                    measured=f"{value:.3f}",
                    worst="",
                    compiled="",
                    rows=f"{counted} of {len(own)}",
                    passed=counted == len(own) and value <= goal,
                )
            )
    return found


def show(curve: Curve, rows: Sequence[Measured]) -> None:
    """Times, ratios and memory per token at each length, and the exponents."""
    length = lengths(curve)
    peers = [*dict.fromkeys(name for row in rows for name in row.peers)]
    columns = ["row", "ours", *peers, "share", "B/token, ours", *(f"B/token, {p}" for p in peers)]
    lines = [_line(row, length[row.shape], peers) for row in rows]
    table(f"{curve.name} by length", [*columns, ""], lines)
    found = [
        [f"{fit.phase} {fit.dtype} {fit.contestant}", f"{fit.time:.3f}", f"{fit.memory:.3f}"]
        for fit in fits(curve, rows)
    ]
    table("exponents", ("of the length", "time", "memory"), found)


def _line(row: Measured, length: int, peers: Sequence[str]) -> list[Cell | str]:
    name = f"T {length} {row.dtype} {row.phase}"
    seconds = row.seconds()
    if seconds is None or not row.counts:
        reason = ", ".join([*row.flags, *row.notes])
        return [name, Cell("-", "red"), *[""] * (2 * len(peers) + 2), Cell(reason, "red")]
    ratios = {peer: row.ratio(peer) for peer in peers}
    per_token = [row.memory[name] / length if name in row.memory else 0 for name in (OURS, *peers)]
    return [
        name,
        duration(seconds),
        *(f"{ratio[0]:.2f}x" if (ratio := ratios[peer]) else "" for peer in peers),
        f"{row.share:.0%}" if row.share else "",
        *(f"{size:.0f}" if size else "" for size in per_token),
        ", ".join(row.notes),
    ]


def draw(curve: Curve, rows: Sequence[Measured], path: Path) -> bool:
    """Writes the PNG, time and memory over the length; False without matplotlib or rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    counted = [row for row in rows if row.counts]
    if not counted:
        return False
    figure = Figure(figsize=(12, 9), layout="constrained")
    for axes, phase in zip(figure.subplots(2, 2, sharex=True), PHASES, strict=True):
        own = [row for row in counted if row.phase == phase]
        _lines(curve, axes[0], own, lambda row, name: 1e3 * (row.seconds(name) or 0.0))
        _lines(curve, axes[1], own, lambda row, name: row.memory.get(name, 0) / 2**20)
        axes[0].set_title(f"{phase}: ms", fontsize=10)
        axes[1].set_title(f"{phase}: peak extra memory, MiB", fontsize=10)
    for axis in figure.axes:
        axis.set_xlabel("length")
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    os.replace(part, path)
    return True


def _lines(
    curve: Curve, axis: Any, rows: Sequence[Measured], value: Callable[[Measured, str], float]
) -> None:
    """One line for each type and contestant."""
    length = lengths(curve)
    styles = {DTYPE_NAMES[torch.float32]: "-", DTYPE_NAMES[torch.bfloat16]: "--"}
    colours: dict[str, str] = {}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        own = [row for row in rows if row.dtype == dtype]
        for name in dict.fromkeys(name for row in own for name in (OURS, *row.peers)):
            points = _positive({length[row.shape]: value(row, name) for row in own})
            colour = colours.setdefault(name, f"C{len(colours)}")
            style, label = f"{styles.get(dtype, ':')}o", f"{name} {dtype}"
            axis.plot([*points], [*points.values()], style, color=colour, ms=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda tick, _: f"{tick:g}")


def _positive(values: Mapping[int, float]) -> dict[int, float]:
    """Where something was measured."""
    return {key: value for key, value in values.items() if value > 0}
