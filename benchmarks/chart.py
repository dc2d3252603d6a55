"""A picture of a run: speed-ups with losses as plain as wins, and the share of a copy's speed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import COMPILED, EAGER, Measured
from .timing import geometric_mean

# Shades of winning, losing and share, one for each dtype.
_WIN = {"fp32": "#1f6f54", "bf16": "#63b38f"}
_LOSS = {"fp32": "#a93226", "bf16": "#e28277"}
_SHARE = {"fp32": "#34557f", "bf16": "#86a8d4"}
_DTYPES = tuple(_WIN)
_HEIGHT = 0.38  # of a bar; two of them a line


@dataclass(frozen=True)
class Bar:
    """Geometric means over the model shapes of one op, layout, phase and dtype."""

    eager: float
    compiled: float | None
    share: float


def draw(rows: Sequence[Measured], path: Path) -> bool:
    """Writes the PNG; False where matplotlib is missing or no row counts."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = _lines(rows)
    if not lines:
        return False
    figure = Figure(figsize=(14, 1.6 + 0.42 * len(lines)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    for axis, phase in zip(axes, ("forward", "step"), strict=False):
        _ratios(axis, phase, lines)
    _shares(axes[2], lines)
    axes[0].set_yticks(range(len(lines)), list(lines))
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    figure.legend(
        handles=_legend(), loc="outside lower center", ncols=len(_DTYPES) + 1, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=110)
    os.replace(part, path)
    return True


def _ratios(axis: Any, phase: str, lines: dict[str, dict[tuple[str, str], Bar]]) -> None:
    for place, bars in enumerate(lines.values()):
        for i, dtype in enumerate(_DTYPES):
            bar = bars.get((phase, dtype))
            if bar is None:
                continue
            where = place + (i - 0.5) * _HEIGHT
            shades = _WIN if bar.eager >= 1 else _LOSS
            axis.barh(where, bar.eager - 1, _HEIGHT, left=1, color=shades[dtype])
            text = f" {bar.eager:.1f}x" if bar.eager >= 1 else f" {bar.eager:.2f}x"
            axis.annotate(text, (max(bar.eager, 1), where), va="center", fontsize=7)
            if bar.compiled is not None:
                axis.plot(bar.compiled, where, "D", color="black", markersize=3)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.margins(x=0.12)
    axis.set_title(f"{phase}: eager PyTorch's time over ours", fontsize=10)


def _shares(axis: Any, lines: dict[str, dict[tuple[str, str], Bar]]) -> None:
    for place, bars in enumerate(lines.values()):
        for i, dtype in enumerate(_DTYPES):
            bar = bars.get(("step", dtype))
            if bar is not None:
                axis.barh(
                    place + (i - 0.5) * _HEIGHT, 100 * bar.share, _HEIGHT, color=_SHARE[dtype]
                )
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_title("step: % of a copy's speed", fontsize=10)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marker = Line2D([], [], marker="D", color="black", linestyle="", markersize=3)
    marker.set_label("against torch.compile")
    return [*(Patch(color=_WIN[dtype], label=dtype) for dtype in _DTYPES), marker]


def _lines(rows: Sequence[Measured]) -> dict[str, dict[tuple[str, str], Bar]]:
    """The bars of each op and layout, by phase and dtype."""
    groups: dict[str, dict[tuple[str, str], list[Measured]]] = {}
    drawn = (row for row in rows if row.group == "model" and row.dtype in _DTYPES)
    for row in drawn:
        if row.counts and row.phase != "backward" and row.ratio():
            layout = " channels-last" if row.layout == "channels_last" else ""
            line = groups.setdefault(f"{row.op}{layout}", {})
            line.setdefault((row.phase, row.dtype), []).append(row)
    return {
        name: {key: _bar(members) for key, members in line.items()} for name, line in groups.items()
    }


def _bar(rows: Sequence[Measured]) -> Bar:
    eager, compiled = (
        [ratio[0] for row in rows if (ratio := row.ratio(peer))] for peer in (EAGER, COMPILED)
    )
    return Bar(
        geometric_mean(eager),
        geometric_mean(compiled) if compiled else None,
        geometric_mean([row.share for row in rows if row.share]),
    )
