"""`udlkernels explain`: which implementation a call takes, and why not the others."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from udlkernels.benchmarks.declaration import Benchmark


def explain(
    op: Annotated[str, typer.Argument(help="A function of udlkernels.functional.")],
    shape: Annotated[str, typer.Option(help="Size of the main input, such as 4096x768.")],
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp64.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    layout: Annotated[str, typer.Option(help="contiguous or channels_last.")] = "contiguous",
    implementation: Annotated[str, typer.Option(help="auto, kernel, torch or reference.")] = "auto",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An argument of the op; repeat for several."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run one call and name the implementation it takes, with the reasons against the others.

    Examples: udlkernels explain rms_norm --shape 4096x768 --dtype bf16;
    udlkernels explain group_norm --shape 2x320x64x64 --layout channels_last;
    udlkernels explain attention --shape 1x8x512x64 --option causal=top_left --option window=64,None
    """
    import torch

    from udlkernels import _library
    from udlkernels import explain as explain_call
    from udlkernels._errors import ArgumentError
    from udlkernels.benchmarks import benchmarks
    from udlkernels.benchmarks.contestant import draw
    from udlkernels.benchmarks.declaration import DTYPES, Row, Shape

    if dtype not in DTYPES:
        raise ArgumentError("explain", "dtype", f"one of {', '.join(DTYPES)}", dtype)
    declared = next((b for b in benchmarks() if b.op == op), None) or benchmarks(op)[0]
    if declared.op != op:
        raise ArgumentError("explain", "op", "one op", f"the family {op}")
    asked = Shape("asked", _size(shape), layout=layout, options=_options(declared, option))
    arguments = draw(Row(declared, asked, DTYPES[dtype]), torch.device(device))
    explanation = explain_call(
        declared.run, **arguments, **asked.options, implementation=implementation
    )
    if as_json:
        choices = [asdict(choice) for choice in explanation.choices]
        typer.echo(json.dumps({"choices": choices, "isa": _library.isa_active()}))
        return
    typer.echo(str(explanation))
    if device == "cpu" and any(c.implementation == "kernel" for c in explanation.choices):
        threads = torch.get_num_threads()
        typer.echo(f"instruction set {_library.isa_active()}, {threads} threads")


def _options(declared: Benchmark, given: list[str] | None) -> dict[str, Any]:
    """Those of the op's first shape, and those given: values are Python's, or text."""
    from udlkernels._errors import ArgumentError

    found = dict(declared.shapes[0].options)
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ArgumentError("explain", "option", "NAME=VALUE", text)
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _size(text: str) -> tuple[int, ...]:
    from udlkernels._errors import ArgumentError

    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise ArgumentError("explain", "shape", "sizes such as 4096x768", text) from None
