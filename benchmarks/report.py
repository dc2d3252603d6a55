"""Tables of a run for the terminal: with rich where it is installed, plain otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .results import COMPILED, EAGER, OURS, Measured, Run
from .summary import Outcome

BUSY_LOAD = 0.7  # runnable processes, averaged over the minute before the run
_GOOD, _BAD, _ODD = "green", "red", "yellow"


@dataclass(frozen=True)
class Cell:
    text: str
    style: str = ""


Line = Sequence["Cell | str"]


def show(run: Run, results: Sequence[Outcome]) -> None:
    """Rows by op, then the cases, then what could not be counted."""
    heading(run)
    for op in dict.fromkeys(row.op for row in run.rows):
        table(op, ROW_COLUMNS, [_row_line(row) for row in run.rows if row.op == op])
    if run.default_allocator:
        lines = [_row_line(row) for row in run.default_allocator]
        table("the same with the default allocator", ROW_COLUMNS, lines)
    if results:
        cases(results)


def heading(run: Run) -> None:
    """Where and on what it ran, and whether other programs disturbed it."""
    print(_heading(run))
    if (run.environment["load"] or 0.0) > BUSY_LOAD:
        print(f"load {run.environment['load']} before the start: other programs disturb the times")


def cases(results: Sequence[Outcome]) -> None:
    table("cases", CASE_COLUMNS, [_case_line(outcome) for outcome in results])
    asked = [outcome for outcome in results if outcome.passed is not None]
    print(f"{sum(bool(o.passed) for o in asked)} of {len(asked)} cases met")


ROW_COLUMNS = ("row", "ours", "GB/s", "copy", "cached", "eager", "compile", "memory", "")
CASE_COLUMNS = ("case", "goal", "measured", "worst", "compile", "rows", "", "")


def _row_line(row: Measured) -> Line:
    name = row.id.split("/", 1)[1]
    seconds = row.seconds()
    if seconds is None or not (row.counts or row.fell_back):
        reason = ", ".join([*row.flags, *row.notes]) or "not measured"
        return [name, Cell("-", _BAD), *[""] * 6, Cell(reason, _BAD)]
    notes = list(row.notes)
    for peer in row.peers:
        if peer not in (EAGER, COMPILED):
            notes.append(f"{_ratio(row, peer).text} of {peer}")
    if row.fell_back:
        notes.insert(0, "auto took PyTorch's op: counts for nothing")
    return [
        name,
        duration(seconds),
        f"{row.bytes / seconds / 1e9:.1f}" if row.floor else "",
        _percent(row.share),
        _percent(row.cached_share),
        _ratio(row, EAGER),
        _ratio(row, COMPILED),
        _memory(row),
        Cell(", ".join(notes), _ODD),
    ]


def _case_line(outcome: Outcome) -> Line:
    verdict = {True: Cell("met", _GOOD), False: Cell("not met", _BAD), None: Cell("")}
    return [
        outcome.case,
        outcome.goal,
        outcome.measured,
        outcome.worst,
        outcome.compiled,
        outcome.rows,
        verdict[outcome.passed],
        outcome.note,
    ]


def _percent(share: float | None) -> str:
    return f"{share:.0%}" if share else ""


def _ratio(row: Measured, peer: str) -> Cell:
    found = row.ratio(peer)
    if found is None:
        return Cell("")
    ratio, low, high = found
    style = _GOOD if low > 1 else _BAD if high < 1 else ""
    return Cell(f"{ratio:.2f}x [{low:.2f}, {high:.2f}]", style)


def _memory(row: Measured) -> Cell:
    """Peak extra memory of ours over eager PyTorch's."""
    ours, eager = row.memory.get(OURS), row.memory.get(EAGER)
    if not ours or not eager:
        return Cell("")
    return Cell(f"{ours / eager:.2f}x of {eager / 2**20:.1f} MiB", _BAD if ours > eager else "")


def _heading(run: Run) -> str:
    facts = run.environment
    where = facts.get("gpu") or f"{facts['processor']}, {facts['threads']} threads"
    return (
        f"udlkernels {facts['udlkernels']} ({facts['commit']}) beside torch {facts['torch']} on "
        f"{where}, ISA {facts['isa']}, allocator {facts['allocator']}, {run.seconds:.0f} s"
    )


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def table(title: str, columns: Sequence[str], lines: Sequence[Line]) -> None:
    """One table on standard output, wide enough for its longest line where it goes to a file."""
    cells = [[c if isinstance(c, Cell) else Cell(c) for c in line] for line in lines]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain(title, columns, cells)
        return
    drawn = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False
    )
    for i, column in enumerate(columns):
        last = i == len(columns) - 1
        drawn.add_column(column, justify="left" if i == 0 or last else "right")
    for line in cells:
        drawn.add_row(*(Text(cell.text, style=cell.style) for cell in line))
    width = Console(width=1000).measure(drawn).maximum  # never folds a cell; a terminal may wrap
    Console(width=width).print(drawn, end="\n\n")


def _plain(title: str, columns: Sequence[str], cells: Sequence[Sequence[Cell]]) -> None:
    rows = [list(columns), *([cell.text for cell in line] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        print("  ".join(padded).rstrip())
