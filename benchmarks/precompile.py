"""Fills Inductor's cache on all cores before anything is timed.

The measuring process then loads the same graphs in a moment instead of compiling one by one.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from .contestant import draw
from .declaration import Row
from .settings import Plan, Settings, plan

_WORTH_A_POOL = 4  # graphs


def warm(planned: Plan, settings: Settings, progress: Callable[[str], None]) -> None:
    """Compiles every (row, mode) that has a torch.compile peer, each core its own process."""
    if settings.device != "cpu" or len(planned.compiled) < _WORTH_A_POOL:
        return
    context = multiprocessing.get_context("spawn")
    work = sorted(planned.compiled)
    with ProcessPoolExecutor(
        os.cpu_count(), context, initializer=_prepare, initargs=(torch.get_num_threads(), settings)
    ) as pool:
        for done, future in enumerate(
            as_completed([pool.submit(_compile, *item) for item in work])
        ):
            future.result()
            progress(f"compiling the torch.compile peers: {done + 1} of {len(work)}")


_rows: dict[str, Row] = {}


def _prepare(threads: int, settings: Settings) -> None:
    """In the worker: the thread count is part of the code that Inductor writes."""
    torch.set_num_threads(threads)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    _rows.update({row.id: row for row in plan(settings).rows})


def _compile(name: str, mode: str) -> None:
    from .runner import compiled_peer, whole

    row = _rows[name]
    with torch.set_grad_enabled(mode == "step"):
        contestant = compiled_peer(row, draw(row, torch.device("cpu")))
        try:
            whole(contestant, mode)()
        except Exception:  # the measuring process meets it again, and reports it
            return
