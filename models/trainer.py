"""One network in training: an epoch at a time, so that several can take turns."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from udlkernels import explain

from . import checkpoint
from .ops import Ops, set_implementation
from .task import Data, Run, Task, Training

DType = Literal["fp32", "fp64", "bf16"]


@dataclass(frozen=True)
class Computing:
    """Where and how a network is computed. bf16 is autocast over fp32 weights."""

    ops: Ops = "udlkernels"
    device: str = "cpu"
    dtype: DType = "fp32"
    compile: bool = False

    def place(self, data: Data) -> Data:
        """The data on the device, floating point values as wide as the weights."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, self.weight_dtype if tensor.is_floating_point() else None)

        return Data(tuple(map(move, data.train)), tuple(map(move, data.test)))

    def build(self, task: Task[Any], config: Training) -> torch.nn.Module:
        model = task.build(config)
        set_implementation(model, self.ops)
        return model.to(self.device, self.weight_dtype)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "fp64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Trainer:
    """A network, its optimizer, and generators of its own: it trains alike whatever runs beside it.

    `data` must lie on the device already (`Computing.place`).
    """

    def __init__(
        self,
        task: Task[Any],
        variant: str,
        config: Training,
        seed: int,
        computing: Computing,
        data: Data,
    ) -> None:
        self.task, self.variant, self.config, self.seed = task, variant, config, seed
        self.computing, self.data = computing, data
        self.device = torch.device(computing.device)
        seed_all(seed)
        self.model = computing.build(task, config)
        self.chooses_ops = set_implementation(self.model, computing.ops) > 0
        self.forward: Callable[..., Any] = self.model
        if computing.compile:
            self.forward = torch.compile(self.model)
        self.optimizer, self.scheduler = task.optimizer(self.model, config)
        self.shuffle = torch.Generator().manual_seed(seed)
        self.random = checkpoint.random_state(self.device)
        self.vocabulary = None if task.vocabulary is None else task.vocabulary()
        self.history: dict[str, list[float]] = defaultdict(list)

    @property
    def epoch(self) -> int:
        return len(self.history["loss"])

    @property
    def diverged(self) -> bool:
        return self.epoch > 0 and not math.isfinite(self.history["loss"][-1])

    @property
    def done(self) -> bool:
        return self.epoch >= self.config.epochs or self.diverged

    def run_epoch(self) -> None:
        """Train on the examples of an epoch, in a fresh order, and evaluate."""
        checkpoint.set_random_state(self.random, self.device)
        examples = self.data.train[0].shape[0]
        order = torch.randperm(examples, generator=self.shuffle)[: self.config.examples]
        order = order.to(self.device)
        batches = [tensor[order].split(self.config.batch_size) for tensor in self.data.train]
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        self.model.train()
        start = self._time()
        for batch in zip(*batches, strict=True):
            total += self._step(batch)
        seconds = self._time() - start
        if self.task.schedule == "epoch":
            self.scheduler.step()
        steps = len(batches[0])
        self.history["loss"].append(float(total) / steps)
        self.history["seconds_per_step"].append(seconds / steps)
        self._evaluate()
        self.random = checkpoint.random_state(self.device)

    def _step(self, batch: tuple[Tensor, ...]) -> Tensor:
        with self.computing.autocast():
            loss = self.task.loss(self.forward, *batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.task.schedule == "step":
            self.scheduler.step()
        return loss.detach()

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.model.eval()
        some = tuple(tensor[: self.config.evaluated] for tensor in self.data.train)
        for split, data in (("train", some), ("test", self.data.test)):
            with self.computing.autocast():
                values = self.task.evaluate(self.model, *data)
            for name, value in values.items():
                self.history[f"{split}_{name}"].append(float(value))

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def result(self) -> Run:
        return Run(
            variant=self.variant,
            ops=self.computing.ops,
            seed=self.seed,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            history=dict(self.history),
            implementations=self._implementations(),
            diverged=self.diverged,
            shown={} if self.task.show is None else self.task.show(self.model),
        )

    def _implementations(self) -> list[str]:
        """What our ops ran on a batch; asked of a copy, since a forward pass may leave traces."""
        model = copy.deepcopy(self.model).train()
        batch = [tensor[: self.config.batch_size] for tensor in self.data.train]
        with self.computing.autocast():
            explanation = explain(self.task.loss, model, *batch)
        return sorted({f"{choice.op}: {choice.implementation}" for choice in explanation.choices})

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.task.name,
            "variant": self.variant,
            "ops": self.computing.ops,
            "dtype": self.computing.dtype,
            "seed": self.seed,
            **asdict(self.config),
        }

    def save(self, path: Path) -> None:
        state = {
            "identity": self._identity(),
            "vocabulary": self.vocabulary,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "shuffle": self.shuffle.get_state(),
            "random": self.random,
            "history": dict(self.history),
        }
        checkpoint.save(path, state)

    def load(self, path: Path) -> None:
        """Go on from where `save` was called: the weights that follow are the same bit for bit."""
        state = checkpoint.load(path)
        self._check_identity(path, state)
        if state.get("vocabulary") != self.vocabulary:
            raise checkpoint.unusable(path, "a run with the tokens that this Python gives")
        unfit = checkpoint.unusable(path, "a checkpoint of this version of the model")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scheduler"].keys() != self.scheduler.state_dict().keys():
                raise unfit
            self.scheduler.load_state_dict(state["scheduler"])
            self.shuffle.set_state(state["shuffle"])
            checkpoint.set_random_state(state["random"], self.device)
            self.random = state["random"]
            self.history = defaultdict(list, state["history"])
            if not self.history["loss"]:
                raise unfit
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise unfit from error

    def _check_identity(self, path: Path, state: dict[str, Any]) -> None:
        ours, theirs = self._identity(), state.get("identity")
        if not isinstance(theirs, dict):
            raise checkpoint.unusable(path, "a checkpoint of this version of the model")
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                asked = f"a run with {name} = {ours.get(name)}"
                raise checkpoint.unusable(path, f"{asked}, not {theirs.get(name)}")
