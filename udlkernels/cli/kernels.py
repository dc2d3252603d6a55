"""`udlkernels kernels`: compiles every Triton kernel for GPUs that need not be here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from udlkernels._aot import Compiled, Job
    from udlkernels.benchmarks.report import Cell

_COLUMNS = (
    "kernel",
    "target",
    "warps",
    "registers",
    "spills",
    "shared",
    "occupancy",
    "128-bit loads",
    "128-bit stores",
    "instructions",
    "",
)


def kernels(
    only: Annotated[str | None, typer.Argument(metavar="[OP]", help="One op; all if none.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Repeat for several.", show_default="sm_80 sm_90 sm_100 gfx942"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes at a time.", show_default="cores")
    ] = None,
) -> None:
    """Compile every Triton kernel of every launch table ahead of time; no GPU is needed.

    Prints registers, spills, shared memory, occupancy and instruction counts. The exit code is 1
    where a kernel spills registers or does not compile.

    Examples: udlkernels kernels; udlkernels kernels rms_norm --target sm_90 --json
    """
    from udlkernels import _aot, _library
    from udlkernels._errors import ArgumentError

    if not _library.HAS_TRITON:
        expected = "an installed Triton (pip install 'udlkernels[gpu]')"
        raise ArgumentError("kernels", "triton", expected, "none")
    for name in target or ():
        _aot.gpu_target(name)
    modules = [m for m in _aot.kernel_modules() if only is None or m.split(".")[-2] == only]
    if not modules:
        known = ", ".join(m.split(".")[-2] for m in _aot.kernel_modules())
        raise ArgumentError("kernels", "op", f"one of {known}", only)
    todo = _aot.jobs(target or _aot.TARGETS, modules)
    compiled = _compile(todo, workers)
    if as_json:
        typer.echo(json.dumps([asdict(kernel) for kernel in compiled]))
    else:
        _show(compiled)
    raise typer.Exit(int(not all(kernel.ok for kernel in compiled)))


def _compile(todo: Sequence[Job], workers: int | None) -> list[Compiled]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from udlkernels._aot import compile_all

    columns = (TextColumn("compiling {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(todo))

        def done(kernel: Compiled) -> None:
            progress.update(task, advance=1, description=kernel.entry)

        return compile_all(todo, workers=workers, done=done)


def _show(compiled: Sequence[Compiled]) -> None:
    from udlkernels.benchmarks.report import table

    table("kernels", _COLUMNS, [_line(kernel) for kernel in compiled])
    targets = list(dict.fromkeys(kernel.target for kernel in compiled))
    entries = {(kernel.module, kernel.entry) for kernel in compiled}
    spilling = [kernel for kernel in compiled if kernel.spills]
    failed = [kernel for kernel in compiled if kernel.error]
    typer.echo(
        f"{len(entries)} kernels, {len(compiled)} compilations for {' '.join(targets)}: "
        f"{len(spilling)} with spills, {len(failed)} failed"
    )


def _line(kernel: Compiled) -> list[Cell | str]:
    from udlkernels.benchmarks.report import Cell

    name = f"{kernel.module.split('.')[-2]}: {kernel.entry}"
    if kernel.error:
        return [name, kernel.target, *[""] * 8, Cell(kernel.error, "red")]
    return [
        name,
        kernel.target,
        str(kernel.num_warps),
        str(kernel.registers),
        Cell(str(kernel.spills), "red" if kernel.spills else ""),
        str(kernel.shared),
        f"{kernel.occupancy:.0%}",
        f"{kernel.loads_128} of {kernel.loads}",
        f"{kernel.stores_128} of {kernel.stores}",
        str(kernel.instructions["all"]),
        _others(kernel.instructions),
    ]


def _others(instructions: Mapping[str, int]) -> str:
    """The counts worth a look, where there are any."""
    shown = ("shuffle", "special", "atomic", "tensor", "barrier")
    return ", ".join(f"{instructions[name]} {name}" for name in shown if instructions[name])
