"""Clocks, interleaved sampling, and the confidence interval of a ratio."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .contestant import Contestant, Copy

Timed = Contestant | Copy
Samples = dict[str, list[float]]  # seconds per call, by phase
_L2_FLUSH_BYTES = 256 << 20
_SHORTEST_SAMPLE = 3e-3  # seconds; shorter calls are repeated within a sample


@dataclass(frozen=True)
class Budget:
    """How long one mode of one row is sampled.

    Rounds go on for `seconds`, and beyond that to `least`, or to three where a round is slow.
    """

    seconds: float
    least: int
    most: int

    def spent(self, rounds: int, seconds: float) -> bool:
        enough = self.least if seconds < 3 * self.seconds else min(self.least, 3)
        return rounds >= self.most or (rounds >= enough and seconds > self.seconds)


class CpuClock:
    def forward(self, contestant: Timed, repeats: int) -> tuple[float]:
        call, now = contestant.call, time.perf_counter
        started = now()
        for _ in range(repeats):
            call()
        return ((now() - started) / repeats,)

    def step(self, contestant: Timed, repeats: int) -> tuple[float, float]:
        """Seconds of the whole, and of the backward in it; freeing the results is part of both."""
        call, differentiate, now = contestant.call, contestant.backward, time.perf_counter
        backward = 0.0
        started = now()
        for _ in range(repeats):
            outputs = call()
            turned = now()
            grads = differentiate(outputs)
            del outputs, grads
            backward += now() - turned
        return (now() - started) / repeats, backward / repeats


class CudaClock:
    """Times on the GPU's own clock, after a write of more than the second-level cache holds."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def forward(self, contestant: Timed, repeats: int) -> tuple[float]:
        return (self._mean(lambda: (contestant.call(),), repeats, 1)[0],)

    def step(self, contestant: Timed, repeats: int) -> tuple[float, float]:
        def stages() -> Iterator[Any]:
            outputs = contestant.call()
            yield outputs
            yield contestant.backward(outputs)

        forward, backward = self._mean(stages, repeats, 2)
        return forward + backward, backward

    def _mean(self, stages: Callable[[], Any], repeats: int, count: int) -> list[float]:
        marks = []
        for _ in range(repeats):
            self.flush.zero_()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            events[0].record()
            for event, _ in zip(events[1:], stages(), strict=True):
                event.record()
            marks.append(events)
        torch.cuda.synchronize()
        return [
            sum(events[i].elapsed_time(events[i + 1]) for events in marks) / repeats / 1e3
            for i in range(count)
        ]


def sample(
    contestants: Sequence[Timed], mode: str, clock: CpuClock | CudaClock, budget: Budget
) -> dict[str, Samples]:
    """Samples all contestants in turn, each round starting with another one.

    `mode` is "forward" (without gradients) or "step", which also gives the backward's part.
    """
    measure = getattr(clock, mode)
    phases = ("forward",) if mode == "forward" else ("step", "backward")
    found: dict[str, Samples] = {c.name: {phase: [] for phase in phases} for c in contestants}
    with _quiet(), torch.set_grad_enabled(mode == "step"):
        repeats = {c.name: _repeats(measure, c) for c in contestants}
        started, rounds = time.perf_counter(), 0
        while not budget.spent(rounds, time.perf_counter() - started):
            first = rounds % len(contestants)
            rounds += 1
            for contestant in (*contestants[first:], *contestants[:first]):
                if repeats[contestant.name] > 1:
                    measure(contestant, 1)  # the caches hold the contestant before
                seconds = measure(contestant, repeats[contestant.name])
                for phase, value in zip(phases, seconds, strict=True):
                    found[contestant.name][phase].append(value)
    return found


def ratio_interval(
    ours: Sequence[float], peer: Sequence[float], *, level: float = 0.95, draws: int = 1000
) -> tuple[float, float, float]:
    """Ratio of the medians peer / ours, with its bootstrap interval over rounds.

    A round timed both within the same moments, so the two are drawn together.
    """
    pairs = np.stack([np.asarray(ours, float), np.asarray(peer, float)])
    drawn = np.random.default_rng(0).integers(0, pairs.shape[1], (draws, pairs.shape[1]))
    medians = np.median(pairs[:, drawn], axis=2)
    low, high = np.quantile(medians[1] / medians[0], [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(pairs[1]) / np.median(pairs[0])), float(low), float(high)


def geometric_mean(values: Sequence[float]) -> float:
    """NaN where there is nothing to average."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def _repeats(measure: Callable[[Timed, int], tuple[float, ...]], contestant: Timed) -> int:
    measure(contestant, 1)  # first calls choose kernels and fill caches
    once = measure(contestant, 1)[0]
    return max(1, math.ceil(_SHORTEST_SAMPLE / max(once, 1e-9)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
