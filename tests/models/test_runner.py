"""What the runner promises of any task."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from udlkernels import ArgumentError
from udlkernels.models import checkpoint, report, runner
from udlkernels.models.ops import IMPLEMENTATIONS, set_implementation
from udlkernels.models.runner import Options
from udlkernels.models.task import Plan, Run, Task
from udlkernels.models.trainer import Computing, Trainer

ONE = Plan(("normalized",))


def weights(options: Options, name: str) -> dict[str, torch.Tensor]:
    state = checkpoint.load(options.out / "checkpoints" / f"{name}.pt")
    return {**state["model"], **state["optimizer"]["state"][0]}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_times(run: Run) -> dict[str, list[float]]:
    return {name: values for name, values in run.history.items() if name != "seconds_per_step"}


class Stop(Exception):
    pass


def stop_after(epochs: int) -> Any:
    def on_epoch(trainer: Trainer) -> None:
        if trainer.epoch > epochs:
            raise Stop

    return on_epoch


@pytest.mark.parametrize("compare", [False, True], ids=["alone", "with twin"])
@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, compare: bool
) -> None:
    monkeypatch.setattr(runner, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    whole = Options(tmp_path / "whole", compare=compare)
    parts = Options(tmp_path / "parts", compare=compare)
    expected = runner.train(task, ONE, whole)
    with pytest.raises(Stop):
        runner.train(task, ONE, parts, stop_after(epochs))
    seen: list[int] = []
    resumed = runner.train(
        task, ONE, replace(parts, resume=True), lambda trainer: seen.append(trainer.epoch)
    )
    assert min(seen) == epochs + 1
    for a, b in zip(expected.runs, resumed.runs, strict=True):
        assert without_times(a) == without_times(b)
        name = f"normalized-{a.ops}-0"
        assert same(weights(whole, name), weights(parts, name))


def test_finished_run_resumes_to_the_same_results(task: Task, tmp_path: Path) -> None:
    first = runner.train(task, ONE, Options(tmp_path))
    again = runner.train(task, ONE, Options(tmp_path, resume=True), stop_after(0))
    assert again.runs == first.runs


def test_run_is_the_same_whatever_trains_beside_it(task: Task, tmp_path: Path) -> None:
    alone, beside = Options(tmp_path / "a"), Options(tmp_path / "b", compare=True)
    runner.train(task, ONE, alone)
    runner.train(task, ONE, beside)
    name = "normalized-udlkernels-0"
    assert same(weights(alone, name), weights(beside, name))


def test_plan_trains_each_variant_with_each_seed(task: Task, tmp_path: Path) -> None:
    plan = Plan(("plain", "normalized"), seeds=2, changes={"epochs": 1})
    results = runner.train(task, plan, Options(tmp_path, seed=7))
    trained = [(run.variant, run.seed, len(run.history["loss"])) for run in results.runs]
    assert trained == [("plain", 7, 1), ("plain", 8, 1), ("normalized", 7, 1), ("normalized", 8, 1)]
    assert results.runs[0].history["loss"] != results.runs[1].history["loss"]


def test_twin_on_torch_ops_trains_only_where_ops_can_be_chosen(task: Task, tmp_path: Path) -> None:
    plan = Plan(("plain", "normalized"), changes={"epochs": 1})
    results = runner.train(task, plan, Options(tmp_path, compare=True))
    trained = [(run.variant, run.ops) for run in results.runs]
    assert trained == [
        ("plain", "udlkernels"),
        ("normalized", "udlkernels"),
        ("normalized", "torch"),
    ]


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_ops_reach_every_module_that_has_the_choice(task: Task, tmp_path: Path, ops: Any) -> None:
    model = task.build(task.variants["normalized"])
    assert set_implementation(model, ops) == 1
    assert model.norm.implementation == IMPLEMENTATIONS[ops]
    results = runner.train(task, ONE, Options(tmp_path, Computing(ops)))
    assert results.runs[0].ops == ops
    assert results.runs[0].history["loss"][-1] < results.runs[0].history["loss"][0]


def test_files_are_whole_and_say_what_was_run(task: Task, tmp_path: Path) -> None:
    runner.train(task, ONE, Options(tmp_path, seed=3, compare=True))
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert found == [
        "checkpoints/normalized-torch-3.pt",
        "checkpoints/normalized-udlkernels-3.pt",
        "picture.png",
        "results.json",
    ]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["configs"]["normalized"]["learning_rate"] == 0.1
    assert document["versions"]["torch"] == torch.__version__
    assert [row["ops"] for row in document["summary"]] == ["udlkernels", "torch"]
    assert document["summary"][0]["metric"] == [document["runs"][0]["history"]["test_error"][-1]]
    assert document["summary"][0]["seconds_per_step"] > 0


def test_diverged_run_stops_and_is_reported(task: Task, tmp_path: Path) -> None:
    results = runner.train(task, Plan(("exploding",)), Options(tmp_path))
    (run,) = results.runs
    assert run.diverged and math.isnan(run.final("test_error"))
    assert len(run.history["loss"]) < task.variants["exploding"].epochs
    assert report.spread([run.final("test_error")]) == "1 diverged"
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["summary"][0]["metric"] == [None]


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
def test_dtype_of_weights_and_of_products(task: Task, tmp_path: Path, dtype: Any) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = model(x)
        seen.append((model.linear.weight.dtype, out.dtype))
        return torch.nn.functional.cross_entropy(out.float(), y)

    results = runner.train(replace(task, loss=loss), ONE, Options(tmp_path, Computing(dtype=dtype)))
    expected = {
        "fp32": (torch.float32, torch.float32),
        "fp64": (torch.float64, torch.float64),
        "bf16": (torch.float32, torch.bfloat16),
    }
    assert set(seen) == {expected[dtype]}
    assert results.runs[0].history["loss"][-1] < results.runs[0].history["loss"][0]


def test_compiled_network_trains_and_evaluates_the_same_weights(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    called: list[str] = []

    def loss(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        called.append(type(model).__name__)
        return task.loss(model, x, y)

    results = runner.train(
        replace(task, loss=loss), Plan(("plain",)), Options(tmp_path, Computing(compile=True))
    )
    assert "OptimizedModule" in called
    assert results.runs[0].history["loss"][-1] < results.runs[0].history["loss"][0]
    assert set(weights(Options(tmp_path), "plain-udlkernels-0")) == {
        *("linear.weight", "linear.bias", "momentum_buffer")
    }


@pytest.mark.parametrize("asked", [None, 2])
def test_threads_are_those_of_the_config(task: Task, tmp_path: Path, asked: int | None) -> None:
    seen: set[int] = set()

    def loss(*arguments: Any) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return task.loss(*arguments)

    before = torch.get_num_threads()
    plan = Plan(("plain",), changes={"threads": asked, "epochs": 1})
    with pytest.raises(Stop):
        runner.train(replace(task, loss=loss), plan, Options(tmp_path), stop_after(0))
    assert seen == {asked or before}
    assert torch.get_num_threads() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_trains_and_resumes_on_a_gpu(task: Task, tmp_path: Path) -> None:
    computing = Computing(device="cuda")
    first = runner.train(task, ONE, Options(tmp_path, computing))
    again = runner.train(task, ONE, Options(tmp_path, computing, resume=True), stop_after(0))
    assert again.runs == first.runs


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nowhere"])
def test_unusable_device_is_refused(task: Task, tmp_path: Path, device: str) -> None:
    with pytest.raises(ArgumentError, match=r"\[train\] device: expected"):
        runner.train(task, ONE, Options(tmp_path, Computing(device=device)))


def test_negative_seed_is_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"\[train\] seed: expected 0 or more, got -1"):
        runner.train(task, ONE, Options(tmp_path, seed=-1))


def test_missing_package_is_named_before_training(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"matplotlib.*udlkernels\[models\]"):
        runner.train(task, ONE, Options(tmp_path), stop_after(0))


def test_tables_show_what_was_measured(task: Task, tmp_path: Path) -> None:
    results = runner.train(task, task.quick, Options(tmp_path, compare=True))
    experiment, metric, ops = report.tables(task, results)
    assert experiment.row_count == 1
    assert list(metric.columns[0].cells) == ["normalized", "plain"]
    assert list(metric.columns[2].cells) == ["-", "0"]
    assert list(ops.columns[0].cells) == ["normalized"]
    (speed,) = ops.columns[3].cells
    assert float(speed.removesuffix("x")) > 0
    assert len(report.tables(task, replace(results, runs=results.runs[-2:], table=None))) == 1
