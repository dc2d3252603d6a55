"""`udlkernels sample`: text that a trained model writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def sample(
    model: Annotated[str, typer.Argument(help="A model of text that `udlkernels models` lists.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "The statement",
    tokens: Annotated[int, typer.Option(min=0, help="How many to generate.")] = 200,
    temperature: Annotated[
        float | None,
        typer.Option(help="Below 1: more likely tokens; 0: the likeliest.", show_default="1"),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among the K most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the likeliest tokens that reach this probability."),
    ] = None,
    beams: Annotated[
        int | None, typer.Option(help="Beam search with so many candidates, without sampling.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A checkpoint, or a folder of `train`.", show_default="runs/MODEL"),
    ] = None,
    ops: Annotated[
        Literal["udlkernels", "torch", "reference"],
        typer.Option(help="Our kernels, PyTorch's own ops, or the formulas in plain torch."),
    ] = "udlkernels",
) -> None:
    """Generate text from the latest checkpoint of `udlkernels train`, with a cache of keys.

    The text goes to standard output as it comes, the speed to standard error.

    Examples: udlkernels sample ch12_transformer_decoder --prompt "The for statement";
    udlkernels sample ch12_transformer_decoder --temperature 0.8 --top-p 0.9 --seed 3;
    udlkernels sample ch12_transformer_decoder --beams 4 --tokens 60
    """
    from udlkernels.models import restore
    from udlkernels.models.ops import set_implementation

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "beams": beams}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    trained = restore.restore(model, checkpoint or Path("runs") / model)
    set_implementation(trained.network, ops)
    pieces = trained.sample(prompt, tokens, seed=seed, **options)
    typer.echo(prompt, nl=False)
    count, start = 0, time.perf_counter()
    for piece in pieces:
        typer.echo(piece, nl=False)
        count += 1
    seconds = time.perf_counter() - start
    typer.echo()
    rate = f"{count / seconds:.0f} tokens/s" if count else "none"
    typer.echo(f"{count} tokens in {seconds:.2f} s, {rate}, {ops} ops: {trained.path}", err=True)
