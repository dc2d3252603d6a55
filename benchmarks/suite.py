"""One run of the suite, from its settings to its table, JSON file and picture."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from udlkernels._errors import ArgumentError

from . import benchmarks, cases, chart, curves, environment, history, precompile, report, summary
from . import curve as growth
from .allocator import allocator
from .curve import PHASES, Curve
from .declaration import DTYPES, Row
from .progress import Progress
from .results import Measured, Run, read_rows, write_atomically
from .runner import Runner, scaling
from .settings import Plan, Settings, plan


def run(settings: Settings) -> int:
    """Measures, writes and prints; 1 where a row is wrong. A row that fell is only reported."""
    started = time.perf_counter()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no GPU is no news
    device = _device(settings)
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    if settings.curve:
        return max(_curve(settings, device, curve) for curve in curves(settings.selection))
    surroundings = environment.describe(device)
    planned = plan(settings)
    runner = Runner(planned, device, settings.budget)
    with Progress(len(planned.rows)) as progress:
        precompile.warm(planned, settings, progress.note)
        progress.note("measuring this machine's ceilings")
        runner.measure_ceilings()
        rows = list(runner.run(progress.advance))
        fallen = compare_with_history(settings, runner, rows)
        progress.note("measuring the extra cases of the full run")
        found = Run(
            environment=surroundings,
            settings=_as_json(settings),
            ceilings=runner.ceilings_found(),
            rows=rows,
            scaling=_scaling(settings, runner, rows),
            default_allocator=_default_allocator(settings, planned.rows),
        )
    results = []
    if settings.full:
        chosen = benchmarks(settings.selection)
        results = summary.outcomes(rows, chosen, *cases(settings.selection), found.scaling)
    found.cases = [asdict(outcome) for outcome in results]
    found.seconds = round(time.perf_counter() - started, 1)
    write_atomically(settings.out / "bench.json", found.to_json())
    drawn = chart.draw(rows, settings.out / "bench.png")
    if settings.json:
        print(found.to_json())
    else:
        report.show(found, results)
        print(f"written: {settings.out}/bench.json" + (", bench.png" if drawn else ""))
        if not drawn:
            print("no picture: no row that counts, or no matplotlib")
    for fall in fallen:
        print(f"fallen twice running: {fall}", file=sys.stderr)
    return int(any(_is_broken(row) for row in rows))


def _curve(settings: Settings, device: torch.device, curve: Curve) -> int:
    """The same for one op over its lengths."""
    started = time.perf_counter()
    planned = Plan(curve.rows([DTYPES[name] for name in settings.dtypes]), phases=PHASES)
    runner = Runner(planned, device, settings.budget)
    surroundings = environment.describe(device)
    with Progress(len(planned.rows)) as progress:
        rows = list(runner.run(progress.advance))
    found = Run(surroundings, _as_json(settings), runner.ceilings_found(), rows)
    results = growth.outcomes(curve, rows)
    found.cases = [asdict(outcome) for outcome in results]
    found.seconds = round(time.perf_counter() - started, 1)
    path = settings.out / f"curve-{curve.name}.json"
    write_atomically(path, found.to_json())
    drawn = growth.draw(curve, rows, path.with_suffix(".png"))
    if settings.json:
        print(found.to_json())
    else:
        report.heading(found)
        growth.show(curve, rows)
        report.cases(results)
        print(f"written: {path}" + (f", {path.stem}.png" if drawn else ""))
    return int(any(_is_broken(row) for row in rows))


def _is_broken(row: Measured) -> bool:
    return bool({"wrong", "zeros", "error"} & set(row.flags))


def _device(settings: Settings) -> torch.device:
    try:
        device = torch.device(settings.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        expected = "a device of this machine, such as cpu"
        raise ArgumentError("bench", "device", expected, settings.device) from error
    return device


def compare_with_history(
    settings: Settings, runner: Runner, rows: list[Measured]
) -> list[history.Fall]:
    """Adds the run to the history; a row that stands low is measured once more."""
    if settings.history is None:
        return []
    record = history.History(settings.history, environment.machine())
    ratios = history.ratios(rows)
    low = record.low(ratios)
    fallen = record.add(ratios)
    again = {name.rpartition("/")[0] for name in low}
    for row in (row for row in runner.plan.rows if row.id in again):
        second = history.ratios(runner.measure(row))
        fallen = [f for f in fallen if f.id not in second]
        fallen += record.add({name: ratio for name, ratio in second.items() if name in low})
    record.save()
    return fallen


def _scaling(
    settings: Settings, runner: Runner, rows: Iterable[Measured]
) -> dict[str, dict[str, float]]:
    """Steps that stay in the caches, in float32, where the machine has a second thread."""
    threads = torch.get_num_threads()
    if not settings.full or threads < 2 or runner.device.type != "cpu":
        return {}
    small = {
        row.id.rpartition("/")[0]
        for row in rows
        if row.phase == "step"
        and row.counts
        and row.group == "model"
        and row.dtype == "fp32"
        and summary.IN_CACHE // 8 <= row.bytes <= summary.IN_CACHE
    }
    return scaling(runner, [row for row in runner.plan.rows if row.id in small], threads)


def _default_allocator(settings: Settings, rows: Iterable[Row]) -> list[Measured]:
    """The largest fp32 row of each op once more, in a process with glibc's own thresholds."""
    if not settings.full or settings.device != "cpu" or allocator() != "raised":
        return []
    largest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.shape.numel):
        if row.shape.group == "model" and row.dtype == torch.float32:
            largest[row.benchmark.op] = row
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "udlkernels.benchmarks", "--default-allocator"]
        command += ["--no-compile", "--out", folder, "--threads", str(torch.get_num_threads())]
        for row in largest.values():
            command += ["--row", f"{row.id}/{row.phases[-1]}"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        return read_rows(Path(folder) / "bench.json")


def _as_json(settings: Settings) -> dict[str, object]:
    return json.loads(json.dumps(asdict(settings), default=str))  # type: ignore[no-any-return]
