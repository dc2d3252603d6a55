"""instance_norm and adaptive_instance_norm: values, statistics, gradients, layouts, modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import udlkernels
from tests.support import assert_compiles, assert_deterministic, assert_rows_independent
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.normalization.instance_norm import reference

SHAPES = [(2, 5, 12), (2, 3, 63), (2, 6, 5, 7), (3, 40, 8, 9), (2, 3, 3, 4, 5)]
SMALL = [(2, 5, 12), (2, 3, 3, 5)]


def _inputs(shape, dtype=torch.float32, device="cpu", layout="contiguous", values="normal"):
    x = testing.make(shape, dtype, values, layout, device)
    return [x, *(testing.make((shape[1],), dtype, device=device, seed=seed) for seed in (1, 2))]


def _kernel(x, w, b):
    return U.instance_norm(x, weight=w, bias=b, implementation="kernel")


def _oracle(x, w, b):
    return reference.instance_norm(x, weight=w, bias=b)


def _torch(x, w, b):
    return F.instance_norm(x, weight=w, bias=b)


def _adaptive(x, scale, shift):
    return U.adaptive_instance_norm(x, scale, shift, implementation="kernel")


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        testing.compare(_kernel, _oracle, [_torch], _inputs(shape, dtype, every_backend.device))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in [(2, 6, 3, 5)] if backend.small else [(4, 24, 5, 7), (4, 17, 50)]:
        inputs = _inputs(shape, dtype, backend.device, layout)
        testing.compare(_kernel, _oracle, [_torch], inputs)


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    inputs = _inputs((2, 24, 40), dtype, backend.device, values=values)
    gradients = values not in ("nonfinite", "constant", "zeros")
    testing.compare(_kernel, _oracle, [_torch], inputs, gradients=gradients)


def test_running_statistics(backend):
    x, w, b = _inputs((3, 4, 9), device=backend.device)
    ours = [torch.full((4,), value, device=backend.device) for value in (0.5, 2.0)]
    theirs, exact = [t.clone() for t in ours], [t.double() for t in ours]
    U.instance_norm(x, *ours, w, b, True, 0.3, implementation="kernel")
    F.instance_norm(x, *theirs, w, b, True, 0.3)
    reference.instance_norm(x.double(), *exact, None, None, True, 0.3)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        testing.check(mine, right, [other], "running statistic")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_adaptive_instance_norm(backend, dtype, layout):
    for shape in SMALL if backend.small else SHAPES:
        x = testing.make(shape, dtype, layout=layout, device=backend.device)
        params = [
            testing.make(shape[:2], dtype, device=backend.device, seed=seed) for seed in (1, 2)
        ]
        testing.compare(_adaptive, reference.adaptive_instance_norm, [], [x, *params])


def test_gradcheck_on_the_kernel():
    x, w, b = (t.requires_grad_() for t in _inputs((2, 3, 4), torch.float64))
    scale, shift = (testing.make((2, 3), torch.float64, seed=s).requires_grad_() for s in (3, 4))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(_kernel, [x, w, b])
        assert check(_adaptive, [x, scale, shift])


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    inputs = [_inputs((n, 6, 10)) for n in (4, 7)]
    ops = ("group_norm_fwd", "group_norm_bwd")
    assert_compiles(_kernel, inputs, ops, name, shapes == "dynamic")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_at_any_thread_count(dtype_any, layout):
    for shape in [(8, 24, 20, 20), (3, 6, 3000)]:
        assert_deterministic(_kernel, _inputs(shape, dtype_any, layout=layout))


def test_samples_do_not_depend_on_each_other(backend, dtype):
    shape = (6, 6, 4, 5) if backend.small else (9, 24, 9, 10)
    assert_rows_independent(_kernel, _inputs(shape, dtype, backend.device))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, dict(affine=True, track_running_stats=True)])
def test_modules_are_torchs(dims, options):
    name = f"InstanceNorm{dims}d"
    ours, theirs = (getattr(m, name)(4, **options) for m in (udlkernels.nn, torch.nn))
    assert isinstance(ours, getattr(torch.nn, name))
    for training in (True, False):
        ours.train(training), theirs.train(training)
        x = testing.make((2, 4, *(5, 3, 4)[:dims]))
        testing.check(ours(x), theirs(x).double(), [])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    unbatched = testing.make((4, *(5, 3, 4)[:dims]))
    testing.check(ours(unbatched), theirs(unbatched).double(), [])


def test_bad_input_gives_torchs_own_answer():
    x = testing.make((4, 6, 5))
    for args in [(x[:, :, :1],), (x, None, None, torch.ones(5)), (x.int(),)]:
        with pytest.raises(Exception) as ours:
            U.instance_norm(*args)
        with pytest.raises(Exception) as theirs:
            F.instance_norm(*args)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


@pytest.mark.parametrize(
    "change",
    [
        dict(scale=torch.ones(4, 5)),
        dict(shift=torch.ones(6)),
        dict(input=torch.ones(4, 6, 5).int()),
        dict(eps=-1.0),
    ],
    ids=["scale", "shift", "integers", "eps"],
)
def test_bad_input_to_adaptive_instance_norm(change):
    arguments = dict(input=testing.make((4, 6, 5)), scale=torch.ones(4, 6), shift=torch.ones(4, 6))
    with pytest.raises(udlkernels.ArgumentError, match=r"\[adaptive_instance_norm\]"):
        U.adaptive_instance_norm(**(arguments | change))
