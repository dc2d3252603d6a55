"""Measures every op beside its peers: `python -m udlkernels.benchmarks`, or `udlkernels bench`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from udlkernels._errors import ArgumentError

if TYPE_CHECKING:
    from .declaration import Benchmark, Case, OverheadCase

FAMILIES = ("normalization", "attention")


def benchmarks(selection: str | None = None) -> list[Benchmark]:
    """The declarations of a family, of one op, or of everything.

    Raises:
        ArgumentError: where nothing has that name.
    """
    every = [benchmark for family in FAMILIES for benchmark in _declared(family)]
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


def _declared(family: str) -> Iterator[Benchmark]:
    package = importlib.import_module(f"{__name__}.{family}")
    for module in pkgutil.iter_modules(package.__path__):
        declared = getattr(
            importlib.import_module(f"{package.__name__}.{module.name}"), "BENCHMARK", None
        )
        if declared is not None:
            yield declared
