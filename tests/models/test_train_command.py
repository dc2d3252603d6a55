"""`udlkernels models` and `udlkernels train` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from udlkernels import ArgumentError, models
from udlkernels.cli import app
from udlkernels.models.task import Task

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def only_the_tiny_task(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "names", lambda: [task.name])
    monkeypatch.setattr(models, "load", lambda name: task)


def test_models_lists_what_a_reader_chooses_by(task: Task) -> None:
    output = run(app, ["models"], env={"COLUMNS": "120"}).output
    for word in ("chapter", "ch00_tiny", "0.1", "batch_norm", "1 s", "error"):
        assert word in output


def test_models_as_json(task: Task) -> None:
    (listed,) = json.loads(run(app, ["models", "--json"]).output)
    assert listed == {
        "name": "ch00_tiny",
        "chapter": 0,
        "section": "0.1",
        "title": "Tiny",
        "ops": ["batch_norm"],
        "quick_seconds": 1,
        "metric": "error",
    }


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        (["--quick"], 6),
        (["--full"], 9),
        (["--ops", "torch"], 4),
        (["--ops", "reference", "--dtype", "fp64", "--seed", "5"], 4),
        (["--dtype", "bf16", "--device", "cpu"], 6),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_train_writes_and_reports(tmp_path: Path, arguments: list[str], runs: int) -> None:
    result = run(app, ["train", "ch00_tiny", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "done after 6 epochs" in result.output
    assert "expected" in result.output
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(document["runs"]) == runs
    seed = int(arguments[-1]) if "--seed" in arguments else 0
    assert document["runs"][0]["seed"] == seed
    assert ("trained in turn" in result.output) == (runs == 6)


def test_interrupted_run_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    command = ["train", "ch00_tiny", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("udlkernels.models.runner._experiment", interrupt)
        stopped = run(app, command)
    assert stopped.exit_code == 130 and "--resume" in stopped.output
    assert not (tmp_path / "results.json").exists()
    resumed = run(app, [*command, "--resume"])
    assert resumed.exit_code == 0 and "done after" not in resumed.output
    assert (tmp_path / "results.json").exists()


def test_unknown_model_gets_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(
        ArgumentError, match=r"expected ch11_residual_network.*, got ch11_residual$"
    ):
        models.load("ch11_residual")


@pytest.mark.parametrize("option", ["--ops=numpy", "--dtype=int8", "--seed=-1", "--seed=x"])
def test_wrong_option_is_a_usage_error(option: str) -> None:
    assert run(app, ["train", "ch00_tiny", option]).exit_code == 2


def test_default_folder_is_named_after_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(app, ["train", "ch00_tiny"]).exit_code == 0
    assert (tmp_path / "runs" / "ch00_tiny" / "picture.png").exists()
