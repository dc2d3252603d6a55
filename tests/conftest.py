"""Devices that every kernel test runs on, and poisoned memory for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

# Triton looks at this when it is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from udlkernels import _library, testing


@dataclass(frozen=True)
class Backend:
    """Where kernels run in a test, and the element types worth testing there."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def small(self) -> bool:
        """Whether only small shapes are affordable."""
        return self.name == "interpreter"


_ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _backends() -> list[Backend]:
    """The instruction sets this CPU runs, strongest first, then the interpreter, then CUDA."""
    found, best = [], _library.isa_found()
    for name in reversed(_library.isas_built()):
        if _library.isas_built().index(name) <= _library.isas_built().index(best or name):
            found.append(Backend(f"cpu-{name}", "cpu", _ALL))
    if _library.INTERPRETED:
        found.append(Backend("interpreter", "cpu", (torch.float32, torch.float16)))
    if torch.cuda.is_available():
        found.append(Backend("cuda", "cuda", _ALL))
    return found


BACKENDS = _backends()
# The other instruction sets run the same source: one test an op covers them.
MAIN_BACKENDS = [b for b in BACKENDS if not b.name.startswith("cpu-")] + BACKENDS[:1]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` (and `dtype`) on the main backends, `every_backend` on all of them."""
    for fixture, backends in (("backend", MAIN_BACKENDS), ("every_backend", BACKENDS)):
        if fixture not in metafunc.fixturenames:
            continue
        if "dtype" in metafunc.fixturenames:
            cases = [(b, dtype) for b in backends for dtype in b.dtypes]
            params = [
                pytest.param(*c, id=f"{c[0].name}-{str(c[1])[6:]}", marks=_gpu(c[0])) for c in cases
            ]
            metafunc.parametrize((fixture, "dtype"), params, indirect=[fixture])
        else:
            params = [pytest.param(b, id=b.name, marks=_gpu(b)) for b in backends]
            metafunc.parametrize(fixture, params, indirect=True)


def _gpu(backend: Backend) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.gpu,) if backend.device == "cuda" else ()


def _use(backend: Backend) -> Iterator[Backend]:
    if backend.name == "interpreter":
        with _library.interpreter():
            yield backend
    elif backend.device == "cpu":
        with testing.isa(backend.name.removeprefix("cpu-")):
            yield backend
    else:
        yield backend


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The best instruction set, Triton's interpreter, and CUDA where there is a GPU."""
    yield from _use(request.param)


@pytest.fixture
def every_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The main backends and every other instruction set that this CPU runs."""
    yield from _use(request.param)


@pytest.fixture(scope="session", autouse=True)
def _poisoned() -> None:
    testing.poison_allocations()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=_ALL, ids=lambda dtype: str(dtype)[6:])
def dtype_any(request: pytest.FixtureRequest) -> torch.dtype:
    """Every element type, on the CPU with the best instruction set."""
    return request.param
