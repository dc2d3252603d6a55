"""The residual network of chapter 11: its form, and what the book says of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from udlkernels import functional, models, testing
from udlkernels.models import ch11_residual_network as chapter
from udlkernels.models import runner
from udlkernels.models.ops import set_implementation
from udlkernels.models.runner import Options
from udlkernels.models.task import Data, Plan
from udlkernels.models.trainer import Computing

CONFIG = chapter.Config()


@pytest.fixture(scope="module")
def data() -> Data:
    """every second example of the real data."""
    whole = chapter.mnist1d()
    return Data(tuple(t[::2] for t in whole.train), tuple(t[::2] for t in whole.test))


def test_task_is_found_under_its_name() -> None:
    assert models.load("ch11_residual_network") is chapter.TASK
    assert chapter.TASK.name in models.names()
    assert {*chapter.TASK.quick.variants, *chapter.TASK.full.variants} == {*chapter.VARIANTS}
    assert {*chapter.TASK.expected} <= {*chapter.VARIANTS}
    assert {*chapter.TASK.ops} <= {*functional.__all__}


@pytest.mark.parametrize(
    ("variant", "weights"),
    [
        ("plain", 40 * 100 + 100 + 2 * (100 * 100 + 100) + 100 * 10 + 10),
        ("residual", 25_310),
        ("deep", 55_610),
        ("deep_batch_norm", 55_610 + 5 * 200),
        ("deep_layer_norm", 55_610 + 5 * 200),
    ],
)
def test_number_of_weights(variant: str, weights: int) -> None:
    network = chapter.ResidualNetwork(chapter.VARIANTS[variant])
    assert sum(parameter.numel() for parameter in network.parameters()) == weights
    assert network(torch.randn(3, 40)).shape == (3, 10)


def test_branches_of_zero_weight_leave_the_input_as_it_is() -> None:
    network = chapter.ResidualNetwork(replace(CONFIG, norm="batch"))
    for branch in network.branches:
        torch.nn.init.zeros_(branch.linear.weight)
    first, *after = network.hidden(torch.randn(8, 40))
    assert all(torch.equal(first, h) for h in after)


def test_plain_twin_has_the_same_weights_and_no_skips() -> None:
    network = chapter.ResidualNetwork(CONFIG)
    twin = chapter.ResidualNetwork(replace(CONFIG, residual=False))
    twin.load_state_dict(network.state_dict())
    x = torch.randn(5, 40)
    h = network.first(x)
    for branch in network.branches:
        h = branch.linear(h.relu())
    assert torch.equal(twin(x), network.last(h.relu()))
    assert not torch.equal(twin(x), network(x))


def test_normalization_comes_first_in_the_branch() -> None:
    branch = chapter.Branch(replace(CONFIG, norm="batch"))
    h = 3 + torch.randn(50, 100)
    expected = branch.linear(torch.relu(branch.norm(h)))
    assert torch.equal(branch(h), expected)


@pytest.mark.parametrize("variant", chapter.VARIANTS)
def test_state_dict_round_trip(variant: str) -> None:
    config = chapter.VARIANTS[variant]
    network, other = chapter.ResidualNetwork(config), chapter.ResidualNetwork(config)
    other.load_state_dict(network.state_dict())
    x = torch.randn(4, 40)
    assert torch.equal(network(x), other(x))


def test_variance_doubles_without_normalization_and_grows_by_one_with_it(data: Data) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        table = chapter.variance_by_block(chapter.ResidualNetwork, data)
    blocks, plain, batch = zip(*table.rows, strict=True)
    assert blocks == (0, 1, 2, 3, 4, 5)
    for before, after in pairwise(plain):
        assert 1.8 < after / before < 2.2
    for before, after in pairwise(batch):
        assert 0.8 < after - before < 1.2


def test_deterministic_and_learns(data: Data, tmp_path: Path) -> None:
    task = replace(chapter.TASK, data=lambda: data)
    plan = Plan(("plain", "residual", "deep_batch_norm"), changes={"epochs": 8})
    first = runner.train(task, plan, Options(tmp_path, compare=True))
    second = runner.train(task, plan, Options(tmp_path))
    for run in first.runs:
        assert run.final("test_error") < 65  # chance is 90
        assert run.history["loss"][-1] < run.history["loss"][0] / 2
    for run in second.runs:
        (same,) = first.select(run.variant, run.ops)
        assert run.history["loss"] == same.history["loss"]
        assert run.history["test_error"] == same.history["test_error"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def gradient(variant: str, data: Data, computing: Computing) -> torch.Tensor:
    """All weights' gradients of the loss of one batch, as one vector."""
    torch.manual_seed(0)
    network = computing.build(chapter.TASK, chapter.VARIANTS[variant])
    x, y = (tensor[:100] for tensor in computing.place(data).train)
    chapter.loss(network, x, y).backward()
    return torch.cat([weight.grad.flatten() for weight in network.parameters()])


@pytest.mark.parametrize("variant", ["deep_batch_norm", "deep_layer_norm"])
def test_gradient_is_as_near_the_true_one_as_with_torch_ops(data: Data, variant: str) -> None:
    oracle = gradient(variant, data, Computing("reference", dtype="fp64"))
    peer = gradient(variant, data, Computing("torch"))
    testing.check(gradient(variant, data, Computing("udlkernels")), oracle, [peer])


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_ops_chosen_in_every_branch(norm: Any) -> None:
    network = chapter.ResidualNetwork(replace(CONFIG, norm=norm))
    assert set_implementation(network, "reference") == CONFIG.blocks
    assert {branch.norm.implementation for branch in network.branches} == {"reference"}
