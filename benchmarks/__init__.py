"""Measures every op beside its peers: `python -m udlkernels.benchmarks`, or `udlkernels bench`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from udlkernels._errors import ArgumentError

if TYPE_CHECKING:
    from .curve import Curve
    from .declaration import Benchmark, Case, OverheadCase

FAMILIES = ("normalization", "attention")


def benchmarks(selection: str | None = None) -> list[Benchmark]:
    """The declarations of a family, of one op, or of everything.

    Raises:
        ArgumentError: where nothing has that name.
    """
    every: list[Benchmark] = [*_found("BENCHMARK")]
    chosen = [b for b in every if selection in (None, b.family, b.op)]
    if not chosen:
        known = sorted({name for b in every for name in (b.family, b.op)})
        close = difflib.get_close_matches(str(selection), known) or known
        raise ArgumentError("bench", "family|op", " or ".join(close), selection)
    return chosen


def cases(selection: str | None = None) -> tuple[list[Case], list[OverheadCase]]:
    """The goals of the chosen ops."""
    ops = {benchmark.op for benchmark in benchmarks(selection)}
    goals: list[Case] = []
    overheads: list[OverheadCase] = []
    for family in FAMILIES:
        module = importlib.import_module(f"{__name__}.{family}")
        goals += [case for case in module.CASES if case.op in ops]
        overheads += [case for case in module.OVERHEAD_CASES if case.op in ops]
    return goals, overheads


def curves(selection: str | None = None) -> list[Curve]:
    """The curves over lengths that are declared, or the one of that name.

    Raises:
        ArgumentError: where none has that name.
    """
    every: list[Curve] = [*_found("CURVE")]
    chosen = [curve for curve in every if selection in (None, curve.name)]
    if not chosen:
        names = " or ".join(curve.name for curve in every)
        raise ArgumentError("bench", "curve", names, selection)
    return chosen


def _found(name: str) -> Iterator[Any]:
    """What the modules of all families declare under a name."""
    for family in FAMILIES:
        package = importlib.import_module(f"{__name__}.{family}")
        for found in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            if hasattr(module, name):
                yield getattr(module, name)
