"""The command line: `udlkernels`, and `python -m udlkernels`.

The modules of the commands import torch when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from udlkernels._version import __version__
from udlkernels.cli import bench, doctor, explain, kernels, sample, train

app = typer.Typer(
    name="udlkernels",
    help="Hand-written kernels for PyTorch: inspect, measure and try them.",
    epilog="Examples: udlkernels doctor; udlkernels bench --quick; "
    "udlkernels explain rms_norm --shape 4096x768 --dtype bf16",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; stands anywhere.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


app.command()(doctor.doctor)
app.command()(bench.bench)
app.command()(kernels.kernels)
app.command()(explain.explain)
app.command()(train.models)
app.command()(train.train)
app.command()(sample.sample)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; an error is one line on standard error, a traceback with `--debug`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        app(args=[argument for argument in given if argument != "--debug"])
    except Exception as error:
        if debug:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        typer.echo(f"error: {lines[0]}", err=True)
        sys.exit(1)
