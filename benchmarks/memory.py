"""Peak memory of one call beyond what was allocated before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_extra(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes allocated at the worst moment of `call`, its results included.

    On the CPU the exact sum over the allocator's events, as the profiler records them.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = call()
        del results
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        results = call()
        del results
    recorded = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return peak
