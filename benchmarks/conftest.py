"""Options of `pytest benchmarks`, and the process state that every timing needs."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("udlkernels")
    group.addoption(
        "--all-rows", action="store_true", help="every declared row, not the quick ones"
    )
    group.addoption("--device", default="cpu", help="cpu or cuda")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
