"""`udlkernels sample`: from a run's checkpoints to text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from udlkernels import ArgumentError, models
from udlkernels.cli import app, main
from udlkernels.models import checkpoint, restore, runner
from udlkernels.models.runner import Options
from udlkernels.models.task import Plan, Task

run = CliRunner().invoke


def sample(model: Any, vocabulary: str, prompt: str, tokens: int, **options: Any) -> Iterator[str]:
    assert vocabulary == "words"
    yield f" {sorted(options.items())}"
    for _ in range(tokens - 1):
        yield f" {model.norm.implementation}"


@pytest.fixture(autouse=True)
def task(task: Task, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The tiny task, as if it wrote text."""
    writer = replace(task, sample=sample, vocabulary=lambda: "words")
    monkeypatch.setattr(models, "names", lambda: [task.name])
    monkeypatch.setattr(models, "load", lambda name: writer)
    monkeypatch.setattr(restore, "load", lambda name: writer)
    return writer


@pytest.fixture
def folder(task: Task, tmp_path: Path) -> Path:
    """A run with our ops and with PyTorch's."""
    plan = Plan(("normalized",), changes={"epochs": 2})
    runner.train(task, plan, Options(tmp_path / "run", compare=True))
    return tmp_path / "run"


def test_text_follows_the_prompt(folder: Path) -> None:
    command = ["sample", "ch00_tiny", "--checkpoint", str(folder), "--prompt", "Say", "--tokens=3"]
    result = run(app, [*command, "--temperature", "0.5", "--top-k", "4", "--seed", "9"])
    assert result.exit_code == 0, result.output
    text, *_ = result.stdout.splitlines()
    assert text == "Say [('seed', 9), ('temperature', 0.5), ('top_k', 4)] auto auto"
    assert "3 tokens in" in result.output and "tokens/s, udlkernels ops" in result.output
    assert "normalized-udlkernels-0.pt" in result.output


@pytest.mark.parametrize("ops", ["torch", "reference"])
def test_ops_are_chosen(folder: Path, ops: str) -> None:
    command = ["sample", "ch00_tiny", "--checkpoint", str(folder), "--tokens=2", "--ops", ops]
    result = run(app, command)
    assert result.stdout.splitlines()[0].endswith(f" {ops}")
    assert f"{ops} ops" in result.output


def test_default_folder_is_that_of_train(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    folder.rename(tmp_path / "runs" / "ch00_tiny")
    assert run(app, ["sample", "ch00_tiny", "--tokens=1"]).exit_code == 0


def test_latest_of_ours_is_taken_or_the_named_one(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    ours, theirs = (checkpoints / f"normalized-{ops}-0.pt" for ops in ("udlkernels", "torch"))
    later = checkpoints / "normalized-udlkernels-1.pt"
    later.write_bytes(ours.read_bytes())
    for path, when in ((ours, 30), (later, 20), (theirs, 40)):
        os.utime(path, (when, when))
    assert restore.restore("ch00_tiny", folder).path == ours
    os.utime(later, (50, 50))
    assert restore.restore("ch00_tiny", checkpoints).path == later
    assert restore.restore("ch00_tiny", theirs).path == theirs
    ours.unlink()
    later.unlink()
    assert restore.restore("ch00_tiny", folder).path == theirs


def test_network_is_the_trained_one(folder: Path) -> None:
    trained = restore.restore("ch00_tiny", folder)
    state = checkpoint.load(trained.path)["model"]
    found = trained.network.state_dict()
    assert found.keys() == state.keys() and not trained.network.training
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_config_is_the_trained_one(task: Task, tmp_path: Path) -> None:
    plan = Plan(("plain",), changes={"epochs": 1})
    runner.train(task, plan, Options(tmp_path))
    (path,) = tmp_path.glob("checkpoints/*.pt")
    assert isinstance(restore.restore("ch00_tiny", path).network.norm, torch.nn.Identity)


def test_without_a_trained_model_the_command_to_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "ch00_tiny", "--checkpoint", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [sample] checkpoint: expected a trained model")
    assert f"udlkernels train ch00_tiny --out {tmp_path}" in line


@pytest.mark.parametrize("content", [b"", b"text"])
def test_spoiled_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "half.pt"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"\[sample\] checkpoint: .* that can be read"):
        restore.restore("ch00_tiny", path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"identity": {"model": "ch99"}}, "a checkpoint of ch00_tiny, got"),
        ({"identity": None}, "a checkpoint of ch00_tiny, got"),
        ({"model": {}}, "a checkpoint of ch00_tiny in this version"),
    ],
    ids=str,
)
def test_checkpoint_of_something_else(
    folder: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    state = checkpoint.load(restore.restore("ch00_tiny", folder).path)
    checkpoint.save(tmp_path / "other.pt", {**state, **changes})
    with pytest.raises(ArgumentError, match=text):
        restore.restore("ch00_tiny", tmp_path / "other.pt")


def test_checkpoint_of_other_tokens_is_not_resumed(task: Task, folder: Path) -> None:
    other = replace(task, vocabulary=lambda: "other words")
    plan = Plan(("normalized",), changes={"epochs": 2})
    with pytest.raises(ArgumentError, match="the tokens that this Python gives"):
        runner.train(other, plan, Options(folder, resume=True))


def test_model_without_text_is_refused(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "load", lambda name: replace(task, sample=None))
    with pytest.raises(ArgumentError, match=r"\[sample\] model: expected a model of text"):
        restore.restore("ch00_tiny", Path("nowhere"))


@pytest.mark.parametrize("option", ["--ops=numpy", "--tokens=-1", "--top-k=x", "--seed=-1"])
def test_wrong_option_is_a_usage_error(option: str) -> None:
    assert run(app, ["sample", "ch00_tiny", option]).exit_code == 2
