"""What a model file declares, and what the runner hands to its picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Training:
    """The settings that the runner itself reads. A model's `Config` extends them."""

    epochs: int = 100
    batch_size: int = 100
    examples: int | None = None  # of an epoch, drawn anew each time; None is all
    evaluated: int | None = None  # training examples looked at after an epoch; None is all
    threads: int | None = None  # of the CPU; None is PyTorch's choice


C = TypeVar("C", bound=Training)


@dataclass(frozen=True)
class Plan:
    """What one command trains: some variants, each with some seeds."""

    variants: tuple[str, ...]
    seeds: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)  # replaced in each variant's config


@dataclass(frozen=True)
class Data:
    """Tensors that share their first dimension, such as (x, y), for training and for testing."""

    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]


@dataclass(frozen=True)
class Table:
    """An experiment beside the training: printed, saved with the results, and drawn."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]]
    caption: str = ""


@dataclass
class Run:
    """One trained network. `history` has one value an epoch under each name."""

    variant: str
    ops: str
    seed: int
    parameters: int
    history: dict[str, list[float]]
    implementations: list[str]  # what each op of ours ran, such as "batch_norm: kernel"
    diverged: bool = False
    shown: dict[str, Any] = field(default_factory=dict)  # what `Task.show` found

    def final(self, name: str) -> float:
        """The last value, NaN for a run that diverged."""
        return float("nan") if self.diverged else self.history[name][-1]


def seconds_per_step(runs: list[Run]) -> float:
    """The median over the runs' epochs."""
    return median(second for run in runs for second in run.history["seconds_per_step"])


@dataclass
class Results:
    """Everything that one command measured."""

    task: str
    runs: list[Run]
    table: Table | None = None

    def select(self, variant: str, ops: str) -> list[Run]:
        return [run for run in self.runs if (run.variant, run.ops) == (variant, ops)]


@dataclass(frozen=True)
class Task(Generic[C]):
    """A model with its data, loss, metric and picture: all that the runner needs to know.

    Args:
        name: the file's name without its ending.
        ops: functions of `udlkernels.functional` that the model exercises.
        metric: the name, among those that `evaluate` returns, that judges a run.
        unit: the metric's.
        quick_seconds: about how long `--quick` takes on two cores.
        variants: the networks to compare.
        expected: for each variant, the metric that the book or its notebook leads to expect.
        build: makes the network from its config, with weights drawn from the global generator.
        loss: `loss(model, *batch)`, a scalar to descend.
        evaluate: `evaluate(model, *data)`, named scalars, called without gradients.
        optimizer: the optimizer and its schedule.
        schedule: whether the schedule is stepped once an epoch or after every batch.
        experiment: `experiment(build, data)`, where `build` makes a network that uses the chosen
            ops on the chosen device.
        show: `show(model)`, plain values that the picture needs of the trained network.
        vocabulary: a text model's tokenizer as text, which its checkpoints carry.
        sample: `sample(model, vocabulary, prompt, tokens, **options)`, the text that goes on from
            the prompt, a piece for each token; the options are those of `generation.generate`.
    """

    name: str
    section: str
    title: str
    ops: tuple[str, ...]
    metric: str
    unit: str
    quick_seconds: int
    variants: Mapping[str, C]
    expected: Mapping[str, str]
    quick: Plan
    full: Plan
    data: Callable[[], Data]
    build: Callable[[C], nn.Module]
    loss: Callable[..., Tensor]
    evaluate: Callable[..., dict[str, Tensor]]
    optimizer: Callable[[nn.Module, C], tuple[Optimizer, LRScheduler]]
    picture: Callable[[Results], Figure]
    experiment: Callable[[Callable[[C], Any], Data], Table] | None = None
    schedule: Literal["epoch", "step"] = "epoch"
    show: Callable[[Any], dict[str, Any]] | None = None
    vocabulary: Callable[[], str] | None = None
    sample: Callable[..., Iterator[str]] | None = None

    @property
    def chapter(self) -> int:
        return int(self.section.split(".")[0])
