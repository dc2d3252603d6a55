"""Checkpoint files: written whole, and refused in one line where they do not fit."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from udlkernels import ArgumentError
from udlkernels.models import checkpoint, runner
from udlkernels.models.runner import Options
from udlkernels.models.task import Task
from udlkernels.models.trainer import Computing, Trainer


class Attack:
    """Unpickled without care, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def flip(content: bytes) -> bytes:
    """One bit of a weight changed."""
    state = torch.load(io.BytesIO(content))
    place = content.index(state["model"]["linear.weight"].numpy().tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


SPOILERS: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda content, path: b"",
    "text": lambda content, path: b"not a checkpoint",
    "truncated": lambda content, path: content[: len(content) // 2],
    "flipped bit": lambda content, path: flip(content),
    "foreign": lambda content, path: saved({"state_dict": {}}),
    "foreign type": lambda content, path: saved([1, 2]),
    "without parts": lambda content, path: saved({"format": checkpoint.FORMAT}),
    "code in torch.save": lambda content, path: saved({"format": Attack(path / "attacked")}),
    "code in a pickle": lambda content, path: pickle.dumps(Attack(path / "attacked")),
}


@pytest.fixture
def trainer(task: Task) -> Trainer:
    return Trainer(task, "normalized", task.variants["normalized"], 0, Computing(), task.data())


@pytest.fixture
def path(trainer: Trainer, tmp_path: Path) -> Path:
    """A checkpoint after one epoch."""
    trainer.run_epoch()
    trainer.save(tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
def test_unusable_file_is_refused_in_one_line(
    trainer: Trainer, path: Path, spoil: Callable[[bytes, Path], bytes]
) -> None:
    path.write_bytes(spoil(path.read_bytes(), path.parent))
    with pytest.raises(ArgumentError, match=r"^\[train\] resume: expected .*, got .*$") as error:
        trainer.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not (path.parent / "attacked").exists()


@pytest.mark.parametrize(
    "part", ["model", "optimizer", "scheduler", "shuffle", "random", "history"]
)
@pytest.mark.parametrize("value", [None, 3, {}, {"a": 1}], ids=repr)
def test_wrong_part_is_refused(trainer: Trainer, path: Path, part: str, value: Any) -> None:
    checkpoint.save(path, {**checkpoint.load(path), part: value})
    with pytest.raises(ArgumentError, match=r"^\[train\] resume: expected .*, got .*$"):
        trainer.load(path)


@pytest.mark.parametrize(
    ("variant", "seed", "dtype", "changes", "message"),
    [
        ("plain", 0, "fp32", {}, "variant = plain, not normalized"),
        ("normalized", 1, "fp32", {}, "seed = 1, not 0"),
        ("normalized", 0, "fp64", {}, "dtype = fp64, not fp32"),
        ("normalized", 0, "fp32", {"epochs": 9}, "epochs = 9, not 6"),
    ],
    ids=["variant", "seed", "dtype", "epochs"],
)
def test_other_settings_are_named(
    task: Task, path: Path, variant: str, seed: int, dtype: Any, changes: dict, message: str
) -> None:
    config = replace(task.variants["normalized"], **changes)
    other = Trainer(task, variant, config, seed, Computing(dtype=dtype), task.data())
    with pytest.raises(ArgumentError, match=f"expected a run with {message}, got"):
        other.load(path)


def test_nothing_to_resume_is_said(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a folder with checkpoints"):
        runner.train(task, task.quick, Options(tmp_path, resume=True))


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write(path, lambda file: file.write(b"old"))

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_random_state_brings_every_generator_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))

    cpu = torch.device("cpu")
    np.random.randn()  # leaves half of a pair of normal numbers behind
    checkpoint.save(tmp_path / "state", {"random": checkpoint.random_state(cpu)})
    first = draw()
    assert draw() != first
    checkpoint.set_random_state(checkpoint.load(tmp_path / "state")["random"], cpu)
    assert draw() == first
