"""The registry behind every op: schemas, fakes, the C++ extension, the Triton launchers.

A schema stands once, in the op's `op.py`. C++ registers the CPU implementations when the extension
is loaded; launchers are imported on their first call, so that importing the package never imports
Triton.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

_EXTENSION = Path(__file__).with_name("_C.so")
_lib = torch.library.Library("udlkernels", "DEF")
_launchers: dict[str, Callable[..., Any]] = {}

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def _load_extension() -> tuple[ctypes.CDLL | None, str]:
    """The extension's library, or None and the reason why there is none."""
    if not _EXTENSION.exists():
        return None, f"{_EXTENSION.name} was not built; reinstall with a C++17 compiler present"
    try:
        torch.ops.load_library(str(_EXTENSION))
        library = ctypes.CDLL(str(_EXTENSION))
    except OSError as error:
        return None, f"{_EXTENSION.name} could not be loaded: {error}"
    for name in ("built", "found", "active"):
        getattr(library, f"udlkernels_isa_{name}").restype = ctypes.c_char_p
    return library, ""


_extension, extension_error = _load_extension()


class _Ready:
    """Which device types have kernels in this process."""

    def __init__(self) -> None:
        self.cpu = _extension is not None or INTERPRETED
        self.cuda = HAS_TRITON and not INTERPRETED


ready = _Ready()


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `udlkernels::<schema>` with its shape function; returns a function that calls it.

    The function skips the Python layer of `OpOverload` (0.8 of 4 µs a call) except while Dynamo
    traces, which has to see the overload.
    """
    name = schema.split("(", 1)[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"udlkernels::{name}", fake, lib=_lib)
    overload = getattr(torch.ops.udlkernels, name).default
    direct = getattr(overload, "_op", overload)

    def call(*args: Any) -> Any:
        return overload(*args) if is_dynamo_compiling() else direct(*args)

    return call


def launchers(module: str, *names: str) -> None:
    """Registers functions of a `kernels.py` (named as the ops) for GPUs, imported when called."""
    for name in names:
        launcher = _lazy(module, name)
        _launchers[name] = launcher
        for key in ("CUDA", "XPU"):
            _lib.impl(name, launcher, key)


def _lazy(module: str, name: str) -> Callable[..., Any]:
    resolved: list[Callable[..., Any]] = []

    def launch(*args: Any) -> Any:
        if not resolved:
            resolved.append(getattr(importlib.import_module(module), name))
        return resolved[0](*args)

    return launch


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Inside, CPU tensors go to the Triton launchers, run by Triton's interpreter.

    Needs TRITON_INTERPRET=1 in the environment before Triton is imported.
    """
    if not INTERPRETED:
        raise RuntimeError("set TRITON_INTERPRET=1 before Python starts to interpret the kernels")
    override = torch.library.Library("udlkernels", "IMPL")
    for name, launcher in _launchers.items():
        override.impl(name, launcher, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()


def isas_built() -> list[str]:
    """The instruction sets the extension was compiled for, weakest first."""
    if _extension is None:
        return []
    return [name for name in _extension.udlkernels_isa_built().decode().split(",") if name]


def isa_found() -> str | None:
    """The strongest of them that this CPU runs."""
    return None if _extension is None else _extension.udlkernels_isa_found().decode()


def isa_active() -> str | None:
    """The one in use: that of `UDLKERNELS_ISA`, or `isa_found`."""
    return None if _extension is None else _extension.udlkernels_isa_active().decode()


def set_isa(name: str) -> None:
    """Makes the kernels use the instruction set `name` from now on."""
    if _extension is None or _extension.udlkernels_isa_set(name.encode()) != 0:
        raise ValueError(f"instruction set {name!r} is not built or this CPU cannot run it")
