"""Runs the rows of a plan: ceilings, then for each row its gate, its times and its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from . import gate
from .allocator import allocator
from .ceilings import Ceilings
from .contestant import Arguments, Contestant, Copy, Read, copied, draw
from .declaration import DTYPE_NAMES, Row
from .memory import peak_extra
from .results import COMPILED, OURS, Measured
from .settings import Plan
from .timing import Budget, CpuClock, CudaClock, Timed, sample

Progress = Callable[[str], None]


class Runner:
    """Measures rows on one device, against the ceilings of the same process."""

    def __init__(
        self, plan: Plan, device: torch.device, budget: Budget, implementation: str = "auto"
    ) -> None:
        self.plan = plan
        self.device = device
        self.budget = budget
        self.implementation = implementation
        self.clock = CudaClock(device) if device.type == "cuda" else CpuClock()
        self.ceilings = Ceilings(device)

    def measure_ceilings(self) -> None:
        """Everything that the rows will be compared with, before the first of them."""
        for row in self.plan.rows:
            if row.shape.group != "overhead":
                for phase in set(row.phases) - {"step"}:
                    self._times(row, phase)

    def run(self, progress: Progress = lambda name: None) -> Iterator[Measured]:
        for row in self.plan.rows:
            progress(row.id)
            yield from self.measure(row)

    def measure(self, row: Row) -> list[Measured]:
        """All phases of one row; a row that fails says so and the run goes on."""
        with _threads(1 if row.shape.group == "overhead" else torch.get_num_threads()):
            found = [self._empty(row, phase) for phase in self._phases(row)]
            try:
                self._fill(row, {measured.phase: measured for measured in found})
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                for measured in found:
                    measured.samples.clear()
                    measured.flags = ["error"]
                    measured.notes.append(f"{type(error).__name__}: {reason}")
            return found

    def _fill(self, row: Row, found: dict[str, Measured]) -> None:
        arguments = draw(row, self.device)
        verdict = gate.check(row, arguments, self.implementation)
        for measured in found.values():
            measured.implementation = verdict.implementation
            measured.errors = verdict.errors
            measured.flags += verdict.flags
            measured.notes += verdict.notes
        if {"wrong", "zeros"} & set(verdict.flags):
            return
        for mode, phases in (("forward", ("forward",)), ("step", ("step", "backward"))):
            wanted = [found[phase] for phase in phases if phase in found]
            if wanted:
                self._sample(row, arguments, mode, wanted)
        for measured in found.values():
            measured.judge()

    def _sample(
        self, row: Row, arguments: Arguments, mode: str, wanted: Iterable[Measured]
    ) -> None:
        with torch.set_grad_enabled(mode == "step"):
            contestants = list(self._contestants(row, arguments, mode, wanted))
            memory = {}
            if row.shape.group != "overhead":
                memory = {c.name: peak_extra(whole(c, mode), self.device) for c in contestants}
        timed: list[Timed] = [*contestants]
        if row.shape.group != "overhead":
            ceiling = Read if row.benchmark.traffic == "read" else Copy
            timed.append(ceiling(row, self.device))
        samples = sample(timed, mode, self.clock, self.budget)
        for measured in wanted:
            for name, phases in samples.items():
                measured.samples[name] = phases[measured.phase]
                if measured.phase == mode and name in memory:
                    measured.memory[name] = memory[name]

    def _contestants(
        self, row: Row, arguments: Arguments, mode: str, wanted: Iterable[Measured]
    ) -> Iterator[Contestant]:
        def bound(name: str, function: Callable[..., Any], **extra: Any) -> Contestant:
            options = {**row.shape.options, **extra}
            return Contestant(name, function, copied(row, arguments), options, row.dtype)

        yield bound(OURS, row.benchmark.run, implementation=self.implementation)
        for peer in row.benchmark.peers:
            yield bound(peer.name, peer.run)
        if (row.id, mode) in self.plan.compiled:
            contestant = compiled_peer(row, arguments)
            try:
                whole(contestant, mode)()
            except Exception as error:
                for measured in wanted:
                    measured.notes.append(f"torch.compile failed: {type(error).__name__}")
            else:
                yield contestant

    def _phases(self, row: Row) -> list[str]:
        return [phase for phase in self.plan.phases if phase in row.phases]

    def _empty(self, row: Row, phase: str) -> Measured:
        cost = row.benchmark.cost(row.shape, row.dtype)
        measured = Measured(
            id=f"{row.id}/{phase}",
            op=row.benchmark.op,
            shape=row.shape.id,
            group=row.shape.group,
            layout=row.shape.layout,
            dtype=DTYPE_NAMES[row.dtype],
            phase=phase,
            threads=torch.get_num_threads(),
            bytes=cost.bytes(phase),
            flops=cost.flops(phase),
            twin=row.shape.twin,
            allocator=allocator(),
            words=list(row.shape.words),
            peer_flops={
                peer.name: peer.cost(row.shape, row.dtype).flops(phase)
                for peer in row.benchmark.peers
                if peer.cost is not None
            },
        )
        if row.shape.group != "overhead":
            parts = ("forward", "backward") if phase == "step" else (phase,)
            times = [self._times(row, part) for part in parts]
            measured.floor, measured.least, measured.computing = (
                sum(part) for part in zip(*times, strict=True)
            )
        return measured

    def _times(self, row: Row, phase: str) -> tuple[float, float, float]:
        """Seconds at the traffic's ceiling, at the best bandwidth of any kind, and of the flops."""
        cost = row.benchmark.cost(row.shape, row.dtype)
        moved = cost.bytes(phase)
        bandwidth = self.ceilings.bandwidth(moved)
        computing = cost.flops(phase) / self.ceilings.product(row.dtype)
        usual = bandwidth.read if row.benchmark.traffic == "read" else bandwidth.copy
        return (
            max(moved / usual, computing),
            max(moved / bandwidth.best, computing),
            computing,
        )

    def ceilings_found(self) -> dict[str, Any]:
        """For the report: bytes per second by working set and threads, flops by dtype."""
        return {
            "bandwidth": [
                {"bytes": size, "threads": threads, **asdict(found)}
                for (size, threads), found in sorted(self.ceilings.bandwidths.items())
            ],
            "product": [
                {"dtype": dtype, "threads": threads, "flops": flops}
                for (dtype, threads), flops in sorted(self.ceilings.products.items())
            ],
        }


def scaling(runner: Runner, rows: Iterable[Row], most: int) -> dict[str, dict[str, float]]:
    """Seconds of our step by number of threads."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        seconds: dict[str, float] = {}
        for threads in (1, most):
            with _threads(threads), torch.enable_grad():
                options = {**row.shape.options, "implementation": runner.implementation}
                arguments = draw(row, runner.device)
                ours = Contestant(OURS, row.benchmark.run, arguments, options, row.dtype)
                samples = sample([ours], "step", runner.clock, runner.budget)[OURS]["step"]
                seconds[str(threads)] = sorted(samples)[len(samples) // 2]
        found[row.id] = seconds
    return found


def compiled_peer(row: Row, arguments: Arguments) -> Contestant:
    """The first peer through torch.compile, for this row's sizes alone."""
    torch._dynamo.reset()
    function = torch.compile(row.benchmark.peers[0].run, dynamic=False)
    return Contestant(COMPILED, function, copied(row, arguments), row.shape.options, row.dtype)


def whole(contestant: Contestant, mode: str) -> Callable[[], Any]:
    if mode == "forward":
        return contestant.call
    return lambda: contestant.backward(contestant.call())


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
