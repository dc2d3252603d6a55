"""The declared rows under pytest-benchmark: `pytest benchmarks --benchmark-compare`.

Contestants of a row stand in one group. `udlkernels bench` gives the interleaved comparison; this
gives a history of absolute times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from udlkernels.benchmarks import gate
from udlkernels.benchmarks.contestant import Contestant, copied, draw
from udlkernels.benchmarks.declaration import Row
from udlkernels.benchmarks.results import OURS
from udlkernels.benchmarks.runner import whole
from udlkernels.benchmarks.settings import Settings, plan

pytest.importorskip("pytest_benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = plan(Settings(full=metafunc.config.getoption("--all-rows"), compile=False)).rows
    contestants = [
        pytest.param(row, name, id=f"{row.id}/{name}")
        for row in rows
        for name in (OURS, *(peer.name for peer in row.benchmark.peers))
    ]
    metafunc.parametrize(("row", "name"), contestants)


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_row(
    benchmark: Any,
    row: Row,
    name: str,
    mode: str,
    request: pytest.FixtureRequest,
) -> None:
    if mode not in row.phases:
        pytest.skip("no input has a gradient")
    device = torch.device(request.config.getoption("--device"))
    arguments = draw(row, device)
    functions = {peer.name: peer.run for peer in row.benchmark.peers}
    options = dict(row.shape.options)
    if name == OURS:
        verdict = gate.check(row, arguments)
        assert not verdict.flags, f"{verdict.flags}: {verdict.notes}"
        options["implementation"] = "auto"
    function = functions.get(name, row.benchmark.run)
    contestant = Contestant(name, function, copied(row, arguments), options, row.dtype)
    benchmark.group = f"{row.id}/{mode}"
    with torch.set_grad_enabled(mode == "step"):
        benchmark(_synchronised(whole(contestant, mode), device))


def _synchronised(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return call

    def launch_and_wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return launch_and_wait
