"""Where a result comes from: versions, processor, flags, commit, allocator."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

from udlkernels import _library

from .allocator import allocator


@functools.cache
def processor() -> str:
    """The processor's name, and family and model where the name tells little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in lines)
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} family {facts.get('cpu family')} model {facts.get('model')}"


def machine() -> str:
    """What ratios depend on: the history keeps one record for each."""
    return f"{processor()}, {_library.isa_active()}, {torch.get_num_threads()} threads"


def describe(device: torch.device) -> dict[str, Any]:
    """What the JSON file records of the surroundings."""
    facts: dict[str, Any] = {
        "udlkernels": _version("udlkernels"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": _version("triton"),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "isa": _library.isa_active(),
        "torch_flags": torch.__config__.show(),
        "allocator": allocator(),
        "allocator_environment": {
            name: value for name, value in os.environ.items() if name.startswith("MALLOC_")
        },
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda or torch.version.hip
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks").is_dir() or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
