"""Trains what a task declares: every variant and seed of a plan, with checkpoints.

The file of a model says what is trained, `trainer` how one network is; here runs are put side by
side. Where the plan compares ops, the same network with PyTorch's own ops trains epoch by epoch
in turn with ours, so that both see the same machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from udlkernels._errors import ArgumentError

from . import checkpoint
from .extras import require
from .task import Data, Plan, Results, Table, Task, Training, seconds_per_step
from .trainer import Computing, Trainer, seed_all

SECONDS_BETWEEN_CHECKPOINTS = 5.0

OnEpoch = Callable[[Trainer], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """The choices of one `udlkernels train`; the `Computing` is that of the main runs."""

    out: Path
    computing: Computing = dataclasses.field(default_factory=Computing)
    seed: int = 0
    resume: bool = False
    compare: bool = False  # with ours, train the same networks with PyTorch's ops


def train(
    task: Task[Any], plan: Plan, options: Options, on_epoch: OnEpoch = lambda trainer: None
) -> Results:
    """Train the plan, and leave checkpoints, `results.json` and `picture.png` in `options.out`."""
    _check(options)
    require("matplotlib")
    data = options.computing.place(task.data())
    results = Results(task.name, [])
    for variant, seed in runs(plan, options.seed):
        config = dataclasses.replace(task.variants[variant], **plan.changes)
        trainers = _trainers(task, variant, config, seed, options, data)
        with cpu_threads(config.threads):
            _fit(trainers, options, on_epoch)
        results.runs += [trainer.result() for trainer in trainers]
    results.table = _experiment(task, options, data)
    _save_results(task, plan, options, results)
    _save_picture(task, options, results)
    return results


def runs(plan: Plan, first_seed: int) -> list[tuple[str, int]]:
    """The variants and seeds of the plan, in the order in which they are trained."""
    seeds = range(first_seed, first_seed + plan.seeds)
    return list(itertools.product(plan.variants, seeds))


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(options: Options) -> None:
    device = options.computing.device
    try:
        usable = torch.empty(0, device=device).device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ArgumentError("train", "device", "cpu or a CUDA device of this machine", device)
    if options.seed < 0:
        raise ArgumentError("train", "seed", "0 or more", options.seed)
    if options.resume and not any(options.out.glob("checkpoints/*.pt")):
        raise checkpoint.unusable(options.out, "a folder with checkpoints of an earlier run")


def _trainers(
    task: Task[Any],
    variant: str,
    config: Training,
    seed: int,
    options: Options,
    data: Data,
) -> list[Trainer]:
    """The network, and its twin on PyTorch's ops where that makes a difference."""
    computing = options.computing
    trainers = [Trainer(task, variant, config, seed, computing, data)]
    if options.compare and computing.ops == "udlkernels" and trainers[0].chooses_ops:
        twin = dataclasses.replace(computing, ops="torch")
        trainers.append(Trainer(task, variant, config, seed, twin, data))
    return trainers


def _fit(trainers: Sequence[Trainer], options: Options, on_epoch: OnEpoch) -> None:
    if options.resume:
        for trainer in trainers:
            if checkpoint_path(options, trainer).exists():
                trainer.load(checkpoint_path(options, trainer))
    saved = time.monotonic()
    order = itertools.cycle([trainers, trainers[::-1]])  # neither always follows the other
    while not all(trainer.done for trainer in trainers):
        for trainer in next(order):
            if not trainer.done:
                trainer.run_epoch()
                on_epoch(trainer)
        if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            _save_checkpoints(trainers, options)
            saved = time.monotonic()
    _save_checkpoints(trainers, options)


def checkpoint_path(options: Options, trainer: Trainer) -> Path:
    name = f"{trainer.variant}-{trainer.computing.ops}-{trainer.seed}.pt"
    return options.out / "checkpoints" / name


def _save_checkpoints(trainers: Sequence[Trainer], options: Options) -> None:
    for trainer in trainers:
        trainer.save(checkpoint_path(options, trainer))


def _experiment(task: Task[Any], options: Options, data: Data) -> Table | None:
    if task.experiment is None:
        return None
    seed_all(options.seed)
    with torch.no_grad():
        return task.experiment(lambda config: options.computing.build(task, config), data)


def _save_results(task: Task[Any], plan: Plan, options: Options, results: Results) -> None:
    document = {
        "model": task.name,
        "section": task.section,
        "metric": f"test_{task.metric}",
        "unit": task.unit,
        "expected": dict(task.expected),
        "plan": dataclasses.asdict(plan),
        "computing": dataclasses.asdict(options.computing),
        "configs": {name: dataclasses.asdict(task.variants[name]) for name in plan.variants},
        "versions": versions(),
        "summary": summary(task, results),
        "runs": [dataclasses.asdict(run) for run in results.runs],
        "table": results.table and dataclasses.asdict(results.table),
    }
    text = json.dumps(_finite(document), allow_nan=False)
    checkpoint.write(options.out / "results.json", lambda file: file.write(text.encode()))


def summary(task: Task[Any], results: Results) -> list[dict[str, Any]]:
    """For each variant and set of ops: the metric of every seed, and the time of a step."""
    rows = []
    for variant, ops in dict.fromkeys((run.variant, run.ops) for run in results.runs):
        chosen = results.select(variant, ops)
        values = [run.final(f"test_{task.metric}") for run in chosen]
        seconds = seconds_per_step(chosen)
        row = {"variant": variant, "ops": ops, "metric": values, "seconds_per_step": seconds}
        rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a number becomes null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def versions() -> dict[str, str | int]:
    """What a reader needs to judge the figures."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _save_picture(task: Task[Any], options: Options, results: Results) -> None:
    figure = task.picture(results)
    path = options.out / "picture.png"
    checkpoint.write(path, lambda file: figure.savefig(file, format="png", dpi=150))
