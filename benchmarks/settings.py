"""What a run measures and how long, from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from udlkernels._errors import ArgumentError

from . import benchmarks, cases
from .allocator import DEFAULT_FLAG
from .declaration import DTYPE_NAMES, DTYPES, PHASES, Row
from .timing import Budget

EXAMPLES = """examples:
  udlkernels bench --quick                          the normalization family in a minute
  udlkernels bench rms_norm --full --dtype bf16     every shape of one op
  udlkernels bench attention --curve                how time and memory grow with the length
  udlkernels bench --row rms_norm/gpt2-4096x768/bf16/step
"""


@dataclass(frozen=True)
class Settings:
    selection: str | None = None
    full: bool = False
    dtypes: tuple[str, ...] = ()
    threads: int | None = None
    out: Path = Path("bench-results")
    device: str = "cpu"
    rows: tuple[str, ...] = ()
    compile: bool = True
    json: bool = False
    default_allocator: bool = False
    history: Path | None = None
    curve: bool = False

    @property
    def budget(self) -> Budget:
        """For one mode of one row."""
        if self.rows or self.curve:
            return Budget(seconds=0.5, least=9, most=100)
        if self.full:
            return Budget(seconds=0.15, least=7, most=50)
        return Budget(seconds=0.06, least=5, most=20)


@dataclass(frozen=True)
class Plan:
    """The rows of a run, which of them (and in which mode) meet torch.compile, and the phases."""

    rows: list[Row]
    compiled: set[tuple[str, str]] = field(default_factory=set)
    phases: tuple[str, ...] = PHASES


def parse(arguments: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m udlkernels.benchmarks",
        description="Measures ops beside PyTorch eager and torch.compile, in one interleaved run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("selection", nargs="?", metavar="family|op", help="what to measure (everything)")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="a shape or two of each op (default)")
    effort.add_argument("--full", action="store_true", help="every row and the table of goals")
    effort.add_argument(
        "--curve", action="store_true", help="time and memory over the length, of the op named"
    )
    add("--dtype", action="append", choices=DTYPES, default=[], help="repeat for several")
    add("--threads", type=int, help="PyTorch's threads (its own choice)")
    add("--out", type=Path, default=Settings.out, help="folder for results (%(default)s)")
    add("--device", default="cpu", help="cpu or cuda")
    add("--row", action="append", default=[], metavar="ID", help="one row, as the table names it")
    add("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    add("--json", action="store_true", help="print the JSON file instead of the table")
    add(DEFAULT_FLAG, action="store_true", help="leave glibc's thresholds as they are")
    add("--history", type=Path, metavar="FILE", help="compare with, and add to, earlier ratios")
    given = vars(parser.parse_args(arguments))
    given.pop("quick")
    given["dtypes"] = tuple(given.pop("dtype"))
    given["rows"] = tuple(given.pop("row"))
    return Settings(**given)


def plan(settings: Settings) -> Plan:
    """The rows that the settings name.

    Raises:
        ArgumentError: an unknown selection, row or device.
    """
    if settings.rows:
        return _named(settings)
    chosen = benchmarks(settings.selection)
    wanted = [DTYPES[name] for name in settings.dtypes]
    rows = [
        Row(benchmark, shape, dtype)
        for benchmark in chosen
        for shape in benchmark.shapes
        if settings.full or shape.quick
        for dtype in wanted or benchmark.dtypes
        if shape.group == "model" or dtype == torch.float32
    ]
    return Plan(rows, _compiled(rows, settings, only_op=len(chosen) == 1))


def _compiled(rows: list[Row], settings: Settings, only_op: bool) -> set[tuple[str, str]]:
    """Which rows meet torch.compile, and in which mode: each costs a second or two of compiling.

    In the quick run the first with a goal. In the full run of one op all of them; of a family,
    those that a goal names, and the float32 steps of the quick shapes.
    """
    model = [row for row in rows if row.shape.group == "model" and row.benchmark.peers[0].compiled]
    if not settings.compile:
        return set()
    goals, _ = cases(settings.selection)
    found: set[tuple[str, str]] = set()
    for row in model:
        op, shape = row.benchmark.op, row.shape
        named = (DTYPE_NAMES[row.dtype], shape.layout, shape.words)
        for mode in (mode for mode in ("forward", "step") if mode in row.phases):
            asked = any(case.covers(op, mode, *named) for case in goals)
            sample = shape.quick and row.dtype == torch.float32
            if asked or (settings.full and mode == "step" and (only_op or sample)):
                found.add((row.id, mode))
            if asked and not settings.full:
                return found
    return found


def _named(settings: Settings) -> Plan:
    known = {
        row.id: row
        for benchmark in benchmarks()
        for shape in benchmark.shapes
        for row in (Row(benchmark, shape, dtype) for dtype in DTYPES.values())
    }
    rows: list[Row] = []
    phases: set[str] = set()
    for name in settings.rows:
        head, _, phase = name.rpartition("/")
        base, phase = (head, phase) if phase in PHASES else (name, "")
        if base not in known or (phase and phase not in known[base].phases):
            raise ArgumentError("bench", "row", "an id that the table shows", name)
        rows.append(known[base])
        phases |= {phase} if phase else set(PHASES)
    modes = {"forward" if phase == "forward" else "step" for phase in phases}
    compilable = [row for row in rows if settings.compile and row.benchmark.peers[0].compiled]
    compiled = {(row.id, mode) for row in compilable for mode in modes & set(row.phases)}
    return Plan(rows, compiled, tuple(phase for phase in PHASES if phase in phases))
