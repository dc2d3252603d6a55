"""SyncBatchNorm on two processes against batch_norm on all their samples in one."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import udlkernels
from udlkernels import testing
from udlkernels.normalization.batch_norm import reference
from udlkernels.normalization.batch_norm.sync import choose_sync

PROCESS = Path(__file__).with_name("sync_batch_norm_process.py")
_spec = importlib.util.spec_from_file_location("sync_batch_norm_process", PROCESS)
process = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(process)


@functools.cache
def _shares(backend: str, folder: Path) -> list[dict]:
    """What each of two processes computed, all cases."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # In a checkout the package need not be installed.
    paths = str(PROCESS.parents[2]), os.environ.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if backend == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(PROCESS)]
    running = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "meeting"), str(folder), backend],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for one in running:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(params=["cpu", "interpreter"])
def shares(request, tmp_path_factory):
    if request.param == "interpreter" and not udlkernels._library.INTERPRETED:
        pytest.skip("Triton's interpreter needs triton, and no GPU")
    base = tmp_path_factory.getbasetemp() / f"sync-{request.param}"
    base.mkdir(exist_ok=True)
    return _shares(request.param, base)


def _whole(case, dtype, run):
    """Results and gradients on the whole batch in one process, as `share` names them."""
    x, dy, options, _ = process.inputs(case, dtype)
    norm = process.module(options, torch.nn.BatchNorm1d)
    x = x.detach().requires_grad_()
    weight, bias = (None if p is None else p.to(dtype) for p in (norm.weight, norm.bias))
    params = [None if p is None else p.detach().requires_grad_() for p in (weight, bias)]
    kept = norm.running_mean, norm.running_var
    kept = [None if t is None else t.to(dtype) for t in kept]
    y = run(x, *kept, *params, True, 1.0 if norm.momentum is None else norm.momentum)
    y.backward(dy)
    grads = [None if p is None else p.grad for p in params]
    names = "y", "x", "weight", "bias", "running_mean", "running_var"
    return dict(zip(names, (y.detach(), x.grad, *grads, *kept), strict=True))


@pytest.mark.parametrize("case", process.CASES)
def test_as_one_batch(shares, case):
    for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16):
        if (case, str(dtype)) not in shares[0]:
            continue
        parts = [part[case, str(dtype)] for part in shares]
        wide = _as_given(case, dtype)
        peer = _whole(case, dtype, F.batch_norm)
        found = {name: torch.cat([part[name] for part in parts]) for name in ("y", "x")}
        for name in ("weight", "bias"):  # each process holds its own samples' part
            found[name] = sum(part[name].double() for part in parts) if name in parts[0] else None
        for name in ("running_mean", "running_var"):
            found[name] = parts[0].get(name)
            if found[name] is not None:
                assert torch.equal(found[name], parts[1][name])
        for name, value in found.items():
            assert (value is None) == (wide[name] is None), name
            if value is not None:
                value = value.to(dtype)
                testing.check(value, wide[name], [peer[name]], f"{case} {dtype} {name}")


def _as_given(case, dtype):
    """The formula in float64 on the values that the processes got."""
    x, dy, _, _ = process.inputs(case, dtype)
    original = process.inputs
    try:
        process.inputs = lambda c, d: (x.double(), dy.double(), *original(c, d)[2:])
        return _whole(case, torch.float64, reference.batch_norm)
    finally:
        process.inputs = original


def test_empty_share(shares):
    part = shares[1]["one-empty", "torch.float32"]
    assert part["y"].shape == part["x"].shape == (0, process.CHANNELS, 9)
    assert not part["weight"].any() and not part["bias"].any()


def test_distributed_data_parallel_takes_it_on_the_cpu(shares):
    torch.manual_seed(0)
    layers = torch.nn.Conv1d(3, 6, 3), torch.nn.BatchNorm1d(6), torch.nn.ReLU()
    peer = torch.nn.Sequential(*layers)
    exact = copy.deepcopy(peer).double()
    x = testing.make((6, 3, 9))
    for model in (peer, exact):
        model(x.to(model[0].weight.dtype)).square().mean().backward()
    for name, p in exact.named_parameters():
        if name != "0.bias":  # nothing but rounding: the norm takes the mean away
            assert torch.equal(shares[0]["ddp"][name], shares[1]["ddp"][name])
            testing.check(shares[0]["ddp"][name], p.grad, [peer.get_parameter(name).grad], name)


@pytest.mark.parametrize("case", ["planes", "cumulative"])
def test_compiled_in_one_graph(tmp_path_factory, case):
    base = tmp_path_factory.getbasetemp() / "sync-cpu"
    base.mkdir(exist_ok=True)
    for part in _shares("cpu", base):
        eager, compiled = part[case, "torch.float32"], part["compiled", case]
        for name, value in eager.items():
            if name.startswith("running"):  # moved by another formula, which reads no count
                testing.check(compiled[name], value.double(), [], name)
            else:
                assert torch.equal(compiled[name], value), name


def test_alone_it_is_batch_norm():
    x = testing.make((4, 6, 5))
    for training in (True, False):
        ours, theirs = udlkernels.nn.SyncBatchNorm(6), torch.nn.BatchNorm1d(6)
        y, expected = (m.train(training)(x) for m in (ours, theirs))
        testing.check(y, expected.double(), [])
        assert ours.state_dict().keys() == torch.nn.SyncBatchNorm(6).state_dict().keys()


def test_conversion_and_acceleration():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4, momentum=0.3), torch.nn.Linear(4, 4))
    weight = model[0].weight
    ours = udlkernels.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(ours[0]) is udlkernels.nn.SyncBatchNorm
    assert ours[0].weight is weight and ours[0].momentum == 0.3
    theirs = torch.nn.Sequential(torch.nn.SyncBatchNorm(4))
    assert type(udlkernels.accelerate(theirs)[0]) is udlkernels.nn.SyncBatchNorm
    assert type(udlkernels.restore(theirs)[0]) is torch.nn.SyncBatchNorm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.ones(5)), r"weight has shape \[5\], not \[6\]"),
        (dict(running_var=None), "one of the running statistics without the other"),
        (dict(eps=0.0), "eps of 0.0"),
        (dict(x=torch.ones(2, 6, dtype=torch.int32)), "torch.int32"),
        (dict(implementation="reference"), "reference"),
        (dict(implementation="torch"), "GPU tensors only"),
        (dict(implementation="fast"), "one of"),
    ],
    ids=["weight", "statistics", "eps", "integers", "reference", "torch", "unknown"],
)
def test_bad_input(change, message):
    kept = dict(running_mean=torch.zeros(6), running_var=torch.ones(6))
    params = dict(weight=torch.ones(6), bias=torch.zeros(6), eps=1e-5)
    arguments = dict(implementation="auto", x=torch.ones(2, 6)) | kept | params | change
    with pytest.raises(udlkernels.ArgumentError, match=message):
        choose_sync(**arguments)
