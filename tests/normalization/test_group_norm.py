"""group_norm and group_norm_act: values, gradients, layouts, compilation, determinism, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import udlkernels
from tests.support import (
    assert_compiles,
    assert_deterministic,
    assert_opcheck,
    assert_rows_independent,
)
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.normalization._activation import ACTIVATIONS
from udlkernels.normalization.group_norm import reference

GROUPS = 3
SHAPES = [(2, 6), (3, 6, 1), (2, 9, 63), (2, 6, 5, 7), (3, 24, 8, 9), (2, 6, 3, 4, 5)]
SMALL = [(2, 6), (2, 6, 9), (2, 6, 3, 5)]


def _inputs(shape, dtype=torch.float32, device="cpu", layout="contiguous", values="normal"):
    x = testing.make(shape, dtype, values, layout, device)
    return [x, *(testing.make((shape[1],), dtype, device=device, seed=seed) for seed in (1, 2))]


def _kernel(x, w, b):
    return U.group_norm(x, GROUPS, w, b, implementation="kernel")


def _oracle(x, w, b):
    return reference.group_norm(x, GROUPS, w, b)


def _torch(x, w, b):
    return F.group_norm(x, GROUPS, w, b)


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        testing.compare(_kernel, _oracle, [_torch], _inputs(shape, dtype, every_backend.device))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in [(2, 6, 3, 5)] if backend.small else [(4, 24, 5, 7), (4, 18, 50)]:
        inputs = _inputs(shape, dtype, backend.device, layout)
        testing.compare(_kernel, _oracle, [_torch], inputs)


def test_channels_last_stays_channels_last(backend):
    x, w, b = _inputs((2, 6, 3, 4), device=backend.device, layout="channels_last")
    assert _kernel(x, w, b).is_contiguous(memory_format=torch.channels_last)
    assert _kernel(x.contiguous(), w, b).is_contiguous()


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    inputs = _inputs((2, 24, 40), dtype, backend.device, values=values)
    gradients = values not in ("nonfinite", "constant", "zeros")
    testing.compare(_kernel, _oracle, [_torch], inputs, gradients=gradients)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_squares_that_overflow_are_rescaled(backend, layout):
    x = testing.make((2, 6, 3, 8), layout=layout, device=backend.device)
    y = U.group_norm(x * 2.0**100, GROUPS, implementation="kernel")
    exact = reference.group_norm(x.double(), GROUPS, eps=0.0)
    testing.check(y, exact, [F.group_norm(x, GROUPS, eps=1e-30)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_group_norm_act(backend, dtype, activation, with_residual):
    keywords = dict(activation=activation, negative_slope=0.2)
    for layout in ("contiguous", "channels_last"):
        shape = (2, 12, 3, 5) if backend.small else (3, 24, 6, 7)
        x, w, b = _inputs(shape, dtype, backend.device, layout)
        residual = testing.make(shape, dtype, layout=layout, device=backend.device, seed=9)
        testing.compare(
            lambda x, w, b, r: U.group_norm_act(
                x, GROUPS, w, b, residual=r, implementation="kernel", **keywords
            ),
            lambda x, w, b, r: reference.group_norm_act(x, GROUPS, w, b, residual=r, **keywords),
            [],
            [x, w, b, residual if with_residual else None],
        )


def test_gradcheck_on_the_kernel():
    x, w, b = (t.requires_grad_() for t in _inputs((2, 6, 3), torch.float64))
    residual = testing.make((2, 6, 3), torch.float64, seed=9).requires_grad_()

    def fused(x, w, b, r):
        return U.group_norm_act(x, GROUPS, w, b, residual=r, implementation="kernel")

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(_kernel, [x, w, b])
        assert check(fused, [x, w, b, residual])


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    inputs = [_inputs((n, 6, 10)) for n in (4, 7)]
    ops = ("group_norm_fwd", "group_norm_bwd")
    assert_compiles(_kernel, inputs, ops, name, shapes == "dynamic")


def test_opcheck():
    op = torch.ops.udlkernels
    for layout in ("contiguous", "channels_last"):
        x, w, b = _inputs((4, 6, 5, 5), layout=layout)
        last = layout == "channels_last"
        args = (x, w, b, x, GROUPS, 1e-5, 5, 0.01, last)
        y, stats = op.group_norm_fwd(*args)
        assert_opcheck(op.group_norm_fwd, args)
        back = (y, x, w, b, x, stats, GROUPS, 5, 0.01, last, True, True, True, False)
        assert_opcheck(op.group_norm_bwd, back)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_at_any_thread_count(dtype_any, layout):
    for shape in [(8, 24, 20, 20), (70, 33), (3, 6, 3000)]:
        assert_deterministic(_kernel, _inputs(shape, dtype_any, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_do_not_depend_on_each_other(backend, dtype, layout):
    shape = (6, 6, 4, 5) if backend.small else (9, 24, 9, 10)
    assert_rows_independent(_kernel, _inputs(shape, dtype, backend.device, layout))


def test_module_is_torchs():
    ours, theirs = udlkernels.nn.GroupNorm(3, 6, eps=1e-3), torch.nn.GroupNorm(3, 6, eps=1e-3)
    assert isinstance(ours, torch.nn.GroupNorm)
    theirs.load_state_dict(ours.state_dict())
    x = testing.make((5, 6, 7))
    testing.check(ours(x), theirs.double()(x.double()), [torch.nn.GroupNorm(3, 6, eps=1e-3)(x)])


def test_bad_input_gives_torchs_own_answer():
    x = testing.make((4, 6, 5))
    for args in [(x, 4), (x, 0), (x, 3, torch.ones(5)), (x.int(), 3), (x[:1, :, :1], 6)]:
        with pytest.raises(Exception) as ours:
            U.group_norm(*args)
        with pytest.raises(Exception) as theirs:
            F.group_norm(*args)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="tanh"), "activation: expected"),
        (dict(residual=torch.ones(4, 6)), "residual: expected"),
        (dict(weight=torch.ones(5)), "weight"),
        (dict(num_groups=4), "4"),
        (dict(input=torch.ones(4, 6, 5).int()), "input: expected"),
        (dict(eps=float("nan")), "eps"),
    ],
    ids=["activation", "residual", "weight", "groups", "integers", "eps"],
)
def test_bad_input_to_group_norm_act(change, message):
    arguments = dict(input=testing.make((4, 6, 5)), num_groups=3) | change
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.group_norm_act(**arguments)
