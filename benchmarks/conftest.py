"""Options of `pytest benchmarks`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("udlkernels")
    group.addoption(
        "--all-rows", action="store_true", help="every declared row, not the quick ones"
    )
    group.addoption("--device", default="cpu", help="cpu or cuda")
