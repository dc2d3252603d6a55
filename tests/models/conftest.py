"""A network of a few weights, so that the runner's own behaviour shows in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from udlkernels.models.task import Data, Plan, Results, Table, Task, Training
from udlkernels.nn import BatchNorm1d


@dataclass(frozen=True)
class Config(Training):
    normalize: bool = True
    learning_rate: float = 0.1
    epochs: int = 6
    batch_size: int = 16


class Network(nn.Module):
    """Draws from every generator that a run has to keep apart from other runs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = BatchNorm1d(4) if config.normalize else nn.Identity()
        self.dropout = nn.Dropout(0.1)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.01 * random.random() + 0.01 * float(np.random.rand())
        return self.linear(self.dropout(self.norm(x)))


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (80,), generator=generator)
    x = torch.randn(80, 4, generator=generator) + 2 * y[:, None]
    return Data(train=(x[:64], y[:64]), test=(x[64:], y[64:]))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"error": (model(x).argmax(dim=1) != y).float().mean()}


def optimizer(
    model: nn.Module, config: Config
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.StepLR]:
    sgd = torch.optim.SGD(model.parameters(), config.learning_rate, momentum=0.9)
    return sgd, torch.optim.lr_scheduler.StepLR(sgd, 2, gamma=0.5)


def picture(results: Results) -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot(results.runs[0].history["loss"])
    return figure


VARIANTS = {
    "normalized": Config(),
    "plain": Config(normalize=False),
    "exploding": Config(normalize=False, learning_rate=1e38),
}


@pytest.fixture
def task() -> Task[Config]:
    return Task(
        name="ch00_tiny",
        section="0.1",
        title="Tiny",
        ops=("batch_norm",),
        metric="error",
        unit="",
        quick_seconds=1,
        variants=VARIANTS,
        expected={"plain": "0"},
        quick=Plan(("normalized", "plain"), seeds=2),
        full=Plan(tuple(VARIANTS), seeds=3),
        data=data,
        build=Network,
        loss=loss,
        evaluate=evaluate,
        optimizer=optimizer,
        picture=picture,
        experiment=lambda build, data: Table(
            "weights", ("bias",), [[float(build(Config()).linear.bias[0])]]
        ),
    )


@pytest.fixture(autouse=True)
def process_left_as_it_was() -> Iterator[None]:
    """The runner seeds the global generators. One thread is best for networks this small."""
    python, numpy_state = random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_num_threads(threads)
