"""`udlkernels models` and `udlkernels train`: the book's models on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from udlkernels.models.trainer import Trainer


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the book's models: chapter, section, ops used, time of a quick run, metric.

    Example: udlkernels models
    """
    from udlkernels.models import load, names

    tasks = [load(name) for name in names()]
    if as_json:
        keys = ("name", "chapter", "section", "title", "ops", "quick_seconds", "metric")
        typer.echo(json.dumps([{key: getattr(task, key) for key in keys} for task in tasks]))
        return
    grid = Table("chapter")
    grid.add_column("model", min_width=max(len(task.name) for task in tasks))
    for title in ("section", "ops", "quick", "metric"):
        grid.add_column(title, no_wrap=True)
    for task in tasks:
        what = f"[bold]{task.name}[/]\n{task.title}"
        cells = (task.section, "\n".join(task.ops), f"{task.quick_seconds} s", task.metric)
        grid.add_row(str(task.chapter), what, *cells)
    Console().print(grid)


def train(
    model: Annotated[str, typer.Argument(help="A name that `udlkernels models` lists.")],
    quick: Annotated[
        bool,
        typer.Option(
            "--quick/--full",
            help="Quick trains few seeds, also on PyTorch's ops to compare; full trains more.",
        ),
    ] = True,
    ops: Annotated[
        Literal["udlkernels", "torch", "reference"],
        typer.Option(help="Our kernels, PyTorch's own ops, or the formulas in plain torch."),
    ] = "udlkernels",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    dtype: Annotated[
        Literal["fp32", "fp64", "bf16"],
        typer.Option(help="bf16 is autocast over fp32 weights."),
    ] = "fp32",
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Train through torch.compile.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints in the output folder.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output folder.", show_default="runs/MODEL")
    ] = None,
) -> None:
    """Train a model of the book; write checkpoints, results.json and picture.png.

    Examples: udlkernels train ch11_residual_network;
    udlkernels train ch11_residual_network --full --ops torch --out runs/torch
    """
    from udlkernels.models import load, report, runner
    from udlkernels.models.trainer import Computing

    console = Console()
    task = load(model)
    plan = task.quick if quick else task.full
    folder = out or Path("runs") / model
    options = runner.Options(
        out=folder,
        computing=Computing(ops, device, dtype, compile_model),
        seed=seed,
        resume=resume,
        compare=quick,
    )
    try:
        with Watch(console, task.metric) as watch:
            results = runner.train(task, plan, options, watch.on_epoch)
    except KeyboardInterrupt:
        console.print("Stopped. The same command with --resume goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    for table in report.tables(task, results):
        console.print(table)
        console.print()
    console.print(f"Wrote {folder}/results.json, picture.png and checkpoints/", highlight=False)


class Watch(Progress):
    """A bar for each network in training, a printed line for each that is done."""

    def __init__(self, console: Console, metric: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        super().__init__(
            *columns, TextColumn("{task.fields[values]}"), console=console, transient=True
        )
        self.metric = metric
        self.bars: dict[Trainer, TaskID] = {}

    def on_epoch(self, trainer: Trainer) -> None:
        name = f"{trainer.variant}, {trainer.computing.ops} ops, seed {trainer.seed}"
        last = {key: values[-1] for key, values in trainer.history.items()}
        values = f"loss {last['loss']:.4f}, test {self.metric} {last[f'test_{self.metric}']:.4g}"
        if trainer not in self.bars:
            self.bars[trainer] = self.add_task(name, total=trainer.config.epochs, values="")
        self.update(self.bars[trainer], completed=trainer.epoch, values=values)
        if trainer.done:
            self.remove_task(self.bars.pop(trainer))
            ended = "diverged" if trainer.diverged else "done"
            self.console.print(
                f"{name}: {ended} after {trainer.epoch} epochs, {values}", soft_wrap=True
            )
