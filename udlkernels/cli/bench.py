"""`udlkernels bench`: our ops beside PyTorch's, interleaved in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    selection: Annotated[
        str | None,
        typer.Argument(metavar="[FAMILY|OP]", help="What to measure; everything if not given."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick", help="Every row and the table of goals, or a shape or two of each op."
        ),
    ] = False,
    curve: Annotated[
        bool, typer.Option("--curve", help="Time and memory over the length, of the op named.")
    ] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16, fp16 or fp64; repeat for several.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="PyTorch's threads.", show_default="its own choice")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path(
        "bench-results"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    row: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="One row, as the table names it.")
    ] = None,
    compile_peers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON, not the table.")] = False,
    default_allocator: Annotated[
        bool,
        typer.Option(
            "--default-allocator",
            help="Leave glibc's thresholds, so that large outputs cost page faults.",
        ),
    ] = False,
    history: Annotated[
        Path | None, typer.Option(help="File of earlier ratios to compare with and to add to.")
    ] = None,
) -> None:
    """Measure ops beside eager PyTorch and torch.compile: time, share of the ceiling, memory.

    A result is checked before it is timed. The exit code is 1 where one is wrong.

    Examples: udlkernels bench --quick; udlkernels bench rms_norm --full --dtype bf16;
    udlkernels bench attention --curve;
    udlkernels bench --row rms_norm/gpt2-4096x768/bf16/step
    """
    arguments = [] if selection is None else [selection]
    efforts = {"--full": full, "--curve": curve}
    arguments += [name for name, wanted in efforts.items() if wanted] or ["--quick"]
    for name, values in (("--dtype", dtype), ("--row", row)):
        for value in values or []:
            arguments += [name, value]
    for name, given in (("--threads", threads), ("--history", history)):
        if given is not None:
            arguments += [name, str(given)]
    arguments += ["--out", str(out), "--device", device]
    flags = {
        "--no-compile": not compile_peers,
        "--json": as_json,
        "--default-allocator": default_allocator,
    }
    arguments += [name for name, wanted in flags.items() if wanted]

    from udlkernels.benchmarks.__main__ import main

    raise typer.Exit(main(arguments))
