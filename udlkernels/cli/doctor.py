"""`udlkernels doctor`: what is here, what is missing and how to get it, and whether it works."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any

import typer

# What an optional package is for, and the extra that brings it.
_OPTIONAL = {
    "triton": ("kernels on a GPU", "gpu"),
    "matplotlib": ("pictures of benchmarks and models", "bench"),
    "pytest_benchmark": ("pytest benchmarks", "bench"),
    "mnist1d": ("the data of the MNIST-1D models", "models"),
    "tokenizers": ("the text models", "models"),
    "transformers": ("attention for its models", "interop"),
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, instruction sets, threads, GPU, what is missing, and a self-test.

    The exit code is 1 where an op gives a wrong result.

    Examples: udlkernels doctor; udlkernels doctor --json
    """
    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found)
    raise typer.Exit(int(any(family["wrong"] for family in found["self_test"].values())))


def diagnose() -> dict[str, Any]:
    """Everything that the command prints, as data."""
    import torch

    from udlkernels import _library

    return {
        "versions": {name: _version(name) for name in ("udlkernels", "torch", "triton", "numpy")}
        | {"python": platform.python_version(), "system": platform.platform()},
        "instruction_sets": {
            "built": _library.isas_built(),
            "found": _library.isa_found(),
            "forced": os.environ.get("UDLKERNELS_ISA"),
            "active": _library.isa_active(),
        },
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "triton_interpreter": _library.INTERPRETED,
        "python_native": _python_native(),
        "missing": _missing(_library.extension_error),
        "self_test": _self_test(),
    }


def _missing(extension_error: str) -> list[str]:
    """One line each, with the way to get it."""
    import torch

    lines = [f"C++ kernels: {extension_error}"] if extension_error else []
    for name, (purpose, extra) in _OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            lines.append(f"{name} ({purpose}): pip install 'udlkernels[{extra}]'")
    if not torch.cuda.is_available():
        lines.append("GPU: torch finds none; the Triton kernels can be compiled, not run")
    return lines


def _python_native() -> dict[str, str] | None:
    """What torch may replace by kernels of its own written in Python; None before torch 2.14."""
    import torch

    native = getattr(torch.backends, "python_native", None)
    if native is None or not hasattr(native, "all_dsls"):
        return None
    state = {}
    for name in native.all_dsls:
        operations = ", ".join(native.get_dsl_operations(name)) or "no operations"
        off = " (disabled)" if native.is_dsl_disabled(name) else ""
        state[name] = operations + off if name in native.available_dsls else "not available"
    return state


def _self_test() -> dict[str, Any]:
    """Each family's ops, forward and backward, on tiny inputs against the float64 formula."""
    import torch

    from udlkernels.benchmarks import FAMILIES, benchmarks, gate
    from udlkernels.benchmarks.contestant import draw
    from udlkernels.benchmarks.declaration import Row

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    results = {}
    for family in FAMILIES:
        for device in map(torch.device, devices):
            implementations: dict[str, list[str]] = {}
            wrong: dict[str, str] = {}
            for benchmark in benchmarks(family):
                row = Row(benchmark, benchmark.shapes[-1], torch.float32)
                try:
                    verdict = gate.check(row, draw(row, device))
                except Exception as error:
                    wrong[benchmark.op] = f"{type(error).__name__}: {error}"
                    continue
                implementations.setdefault(verdict.implementation, []).append(benchmark.op)
                if {"wrong", "zeros"} & set(verdict.flags):
                    wrong[benchmark.op] = "; ".join(verdict.notes)
            results[f"{family} on {device}"] = {"through": implementations, "wrong": wrong}
    return results


def _show(found: dict[str, Any]) -> None:
    sets = found["instruction_sets"]
    lines = [(name, value or "not installed") for name, value in found["versions"].items()]
    lines += [
        ("instruction sets", f"built {' '.join(sets['built']) or 'none'}"),
        ("", f"found {sets['found']}, forced {sets['forced'] or 'none'}, active {sets['active']}"),
        ("threads", str(found["threads"])),
        ("GPU", ", ".join(found["gpu"]) or "none"),
        ("Triton interpreter", "on" if found["triton_interpreter"] else "off"),
    ]
    if found["python_native"] is not None:
        state = "; ".join(f"{name}: {value}" for name, value in found["python_native"].items())
        lines.append(("torch's native", state))
    lines += [("missing" if i == 0 else "", line) for i, line in enumerate(found["missing"])]
    for family, result in found["self_test"].items():
        lines.append(("self-test", f"{family}: {_tested(result)}"))
        lines += [("", f"{op} is wrong: {reason}") for op, reason in result["wrong"].items()]
    _print(lines)


def _tested(result: dict[str, Any]) -> str:
    through = [f"{len(ops)} through {name}" for name, ops in result["through"].items()]
    return ", ".join([*through, f"{len(result['wrong'])} wrong"])


def _print(lines: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name.ljust(width)}  {value}".rstrip())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
