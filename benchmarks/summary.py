"""Holds the measured rows against the goals: one `Outcome` for each case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .declaration import Benchmark, Case, OverheadCase
from .results import COMPILED, EAGER, OURS, Measured
from .timing import geometric_mean

PASSING_SHARE = 0.85  # of the ceiling: a shape that reaches it passes whatever its ratio
SCALING = 1.6
IN_CACHE = 8 << 20  # bytes of a step that stay in the caches


@dataclass(frozen=True)
class Outcome:
    """`passed` None: shown without a goal of its own."""

    case: str
    goal: str
    measured: str
    worst: str
    compiled: str
    rows: str
    passed: bool | None
    note: str = ""


def outcomes(
    rows: Sequence[Measured],
    benchmarks: Sequence[Benchmark],
    cases: Iterable[Case],
    overheads: Iterable[OverheadCase],
    scaling: Mapping[str, Mapping[str, float]],
) -> list[Outcome]:
    """Every case that the rows say something of."""
    goals = [*cases, *_without_goal(benchmarks, cases)]
    found = [_goal(case, _matching(rows, case)) for case in goals]
    found += [_overhead(case, rows) for case in overheads]
    for benchmark in benchmarks:
        own = [row for row in rows if row.op == benchmark.op]
        found += [_odd(benchmark, own), _memory(benchmark, own)]
    found.append(_scaling(scaling))
    return [outcome for outcome in found if outcome is not None]


def _without_goal(benchmarks: Sequence[Benchmark], cases: Iterable[Case]) -> list[Case]:
    """The steps that no goal names as a whole: shown all the same."""
    whole = [case for case in cases if not case.where and case.peer == EAGER]
    covered = {(case.op, case.phase, case.dtype, case.layout) for case in whole}
    found = []
    for benchmark in benchmarks:
        layouts: set[str | None] = {s.layout for s in benchmark.shapes if s.group == "model"}
        for dtype in benchmark.dtypes:
            for layout in sorted(layouts, key=str) if len(layouts) > 1 else [None]:
                if (benchmark.op, "step", dtype, layout) not in covered:
                    found.append(Case(benchmark.op, "step", dtype, layout=layout))
    return found


def _matching(rows: Sequence[Measured], case: Case) -> list[Measured]:
    return [
        row
        for row in rows
        if row.group == "model" and case.covers(row.op, row.phase, row.dtype, row.layout, row.words)
    ]


def _goal(case: Case, rows: Sequence[Measured]) -> Outcome | None:
    if not rows:
        return None
    counted = [row for row in rows if row.counts and row.ratio(case.peer)]
    broken = [row for row in rows if not row.counts and not row.fell_back]
    ratios = {row.shape: _ratio(case, row) for row in counted}
    compiled = [_first(row.ratio(COMPILED)) for row in counted if row.ratio(COMPILED)]
    mean = geometric_mean([*ratios.values()])
    share = geometric_mean([row.share for row in counted if row.share])
    worst = min(ratios, key=ratios.__getitem__, default="")
    memory = _most_memory(case, counted)
    least = min(1.0, case.goal or 1.0)
    slow = [
        row.shape
        for row in counted
        if ratios[row.shape] < least and (row.share or 0.0) < PASSING_SHARE
    ]
    reached = case.goal is None or mean >= case.goal or (case.share or 9.0) <= share
    beaten = case.peer != EAGER or not compiled or geometric_mean(compiled) >= 1
    small = case.memory is None or memory <= case.memory
    passed = bool(counted) and not broken and not slow and reached and beaten and small
    notes = [f"{len(broken)} not right" if broken else ""]
    notes += [f"slower: {', '.join(slow)}" if slow else ""]
    notes += ["torch.compile is faster" if not beaten else ""]
    measured = f"{mean:.2f}x, {share:.0%}" if counted else "-"
    return Outcome(
        case=case.name,
        goal=_wanted(case),
        measured=measured + (f", memory {memory:.2f}x" if counted and case.memory else ""),
        worst=f"{ratios[worst]:.2f}x {worst}" if worst else "-",
        compiled=f"{geometric_mean(compiled):.2f}x, worst {min(compiled):.2f}x" if compiled else "",
        rows=f"{len(counted)} of {len(rows)}",
        passed=None if case.goal is None and passed else passed,
        note="; ".join(note for note in notes if note),
    )


def _ratio(case: Case, row: Measured) -> float:
    return (row.speed_ratio(case.peer) or 0.0) if case.per_flop else _first(row.ratio(case.peer))


def _most_memory(case: Case, rows: Iterable[Measured]) -> float:
    """The largest part of the peer's peak that ours needs."""
    return max(
        (row.memory[OURS] / row.memory[case.peer] for row in rows if row.memory.get(case.peer)),
        default=math.inf,
    )


def _wanted(case: Case) -> str:
    """The goal in words."""
    goal = "" if case.goal is None else f"{case.goal:g}x"
    goal += f" or {case.share:.0%}" if case.share else ""
    return goal + (f", memory {case.memory:g}x" if case.memory else "")


def _overhead(case: OverheadCase, rows: Sequence[Measured]) -> Outcome | None:
    found = [
        row
        for row in rows
        if (row.op, row.phase, row.group) == (case.op, case.phase, "overhead")
        and row.layout == "contiguous"
        and row.samples
    ]
    if not found:
        return None
    ours, eager = (1e6 * (found[0].seconds(name) or 0.0) for name in (OURS, EAGER))
    return Outcome(
        case=f"{case.op} {case.phase} {found[0].shape}, 1 thread",
        goal=f"+{case.extra_us:g} µs" if case.extra_us else "faster",
        measured=f"{ours - eager:+.1f} µs",
        worst=f"{ours:.1f} against {eager:.1f} µs",
        compiled="",
        rows=f"{sum(row.counts for row in found[:1])} of 1",
        passed=found[0].counts and ours - eager <= case.extra_us,
        note=" ".join(found[0].flags),
    )


def _odd(benchmark: Benchmark, rows: Sequence[Measured]) -> Outcome | None:
    """Awkward sizes beside their round twins: time over what the ceilings allow.

    That is time per byte or per flop, whichever bounds the shape.
    """
    by_key = {(row.shape, row.phase, row.dtype): row for row in rows}
    losses = {}
    for row in rows:
        twin = by_key.get((row.twin, row.phase, row.dtype)) if row.twin else None
        ours, other = row.seconds(), twin.seconds() if twin else None
        if twin and ours and other and row.phase != "backward":
            losses[f"{row.shape} {row.phase}"] = (ours / row.floor) / (other / twin.floor)
    if not losses:
        return None
    worst = max(losses, key=losses.__getitem__)
    mean = geometric_mean([*losses.values()])
    return Outcome(
        case=f"{benchmark.op} odd sizes, time over the ceiling's",
        goal=f"{benchmark.odd_loss:g}x of round ones",
        measured=f"{mean:.2f}x",
        worst=f"{losses[worst]:.2f}x {worst}",
        compiled="",
        rows=f"{len(losses)} of {len(losses)}",
        passed=losses[worst] <= benchmark.odd_loss,
    )


def _memory(benchmark: Benchmark, rows: Sequence[Measured]) -> Outcome | None:
    shares = {
        f"{row.shape} {row.dtype}": row.memory[OURS] / row.memory[EAGER]
        for row in rows
        if row.phase == "step" and row.counts and row.memory.get(EAGER)
    }
    if not shares:
        return None
    worst = max(shares, key=shares.__getitem__)
    return Outcome(
        case=f"{benchmark.op} step, peak extra memory",
        goal="below eager's" if benchmark.fused else "at most eager's",
        measured=f"{geometric_mean([*shares.values()]):.2f}x",
        worst=f"{shares[worst]:.3f}x {worst}",
        compiled="",
        rows=f"{len(shares)} of {len(shares)}",
        passed=shares[worst] < 1 if benchmark.fused else shares[worst] <= 1,
    )


def _scaling(scaling: Mapping[str, Mapping[str, float]]) -> Outcome | None:
    """Speed at all threads over speed at one."""
    if not scaling:
        return None
    gains = {row: seconds["1"] / min(seconds.values()) for row, seconds in scaling.items()}
    worst = min(gains, key=gains.__getitem__)
    most = max(int(threads) for seconds in scaling.values() for threads in seconds)
    return Outcome(
        case=f"steps in the caches, 1 to {most} threads",
        goal=f"{SCALING:g}x",
        measured=f"{geometric_mean([*gains.values()]):.2f}x",
        worst=f"{gains[worst]:.2f}x {worst}",
        compiled="",
        rows=f"{len(gains)} of {len(gains)}",
        passed=gains[worst] >= SCALING,
    )


def _first(ratio: tuple[float, float, float] | None) -> float:
    return ratio[0] if ratio else float("nan")
