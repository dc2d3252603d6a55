"""A picture of a run: speed-ups with losses as plain as wins, and the share of the ceiling."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .results import COMPILED, EAGER, Measured
from .timing import geometric_mean

_WIN, _LOSS, _SHARE = "#2a7f62", "#c0392b", "#4a6fa5"


def draw(rows: Sequence[Measured], path: Path) -> bool:
    """Writes the PNG; False where matplotlib is missing or no row counts."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    bars = _bars(rows)
    if not bars:
        return False
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(bars)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = range(len(bars))
    eager = [bar[1] for bar in bars]
    left.barh(
        places, [e - 1 for e in eager], left=1, color=[_WIN if e >= 1 else _LOSS for e in eager]
    )
    compiled = [(i, bar[2]) for i, bar in enumerate(bars) if bar[2] is not None]
    if compiled:
        where, values = zip(*compiled, strict=True)
        left.plot(values, where, "D", color="black", markersize=4, label="against torch.compile")
        figure.legend(loc="outside lower left", frameon=False)
    for i, value in enumerate(eager):
        left.annotate(f" {value:.1f}x", (max(value, 1), i), va="center", fontsize=8)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    left.set_yticks(places, [bar[0] for bar in bars])
    left.invert_yaxis()
    left.set_title("speed-up over eager PyTorch, geometric mean over shapes")
    right.barh(places, [100 * bar[3] for bar in bars], color=_SHARE)
    right.set_title("% of a copy's speed, same bytes, same rounds")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    os.replace(part, path)
    return True


def _bars(rows: Sequence[Measured]) -> list[tuple[str, float, float | None, float]]:
    """Name, ratios to eager and to compiled, and share, one for each op, phase, dtype, layout."""
    groups: dict[str, list[Measured]] = {}
    for row in rows:
        if row.counts and row.group == "model" and row.phase != "backward" and row.ratio():
            layout = " channels-last" if row.layout == "channels_last" else ""
            groups.setdefault(f"{row.op} {row.phase} {row.dtype}{layout}", []).append(row)
    bars = []
    for name, members in groups.items():
        ratios = {
            peer: [r[0] for m in members if (r := m.ratio(peer))] for peer in (EAGER, COMPILED)
        }
        compiled = geometric_mean(ratios[COMPILED]) if ratios[COMPILED] else None
        share = geometric_mean([member.share for member in members if member.share])
        bars.append((name, geometric_mean(ratios[EAGER]), compiled, share))
    return bars
