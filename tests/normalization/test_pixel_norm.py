"""pixel_norm: values, gradients, layouts, compilation, determinism, errors."""

from __future__ import annotations

import pytest
import torch

import udlkernels
from tests.support import (
    assert_compiles,
    assert_deterministic,
    assert_opcheck,
    assert_rows_independent,
)
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.normalization._channels import empty_channels
from udlkernels.normalization.pixel_norm import reference

SHAPES = [(2, 7, 5), (3, 70, 33, 9), (5, 16), (2, 3, 2, 3, 50), (1, 30, 300), (2, 5, 1, 1)]
SMALL = [(2, 7, 5), (5, 16), (2, 3, 3, 3)]
OPS = "pixel_norm_fwd", "pixel_norm_bwd"


def _kernel(x):
    return U.pixel_norm(x, implementation="kernel")


def _compare(x, gradients=True):
    return testing.compare(_kernel, reference.pixel_norm, [], [x], gradients=gradients)


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        for layout in ("contiguous", "channels_last"):
            _compare(testing.make(shape, dtype, layout=layout, device=every_backend.device))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in SMALL if backend.small else SHAPES:
        y = _compare(testing.make(shape, dtype, layout=layout, device=backend.device)).outputs[0]
        assert y.stride() == empty_channels(testing.make(shape, layout=layout)).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values, layout):
    if dtype == torch.bfloat16 and values == "denormal":
        pytest.skip("not a supported value: bfloat16 results below 2^-126 become zero")
    x = testing.make((2, 9, 5, 6), dtype, values, layout, backend.device)
    _compare(x, gradients=values != "nonfinite")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_squares_that_overflow_are_rescaled(backend, layout):
    x = testing.make((2, 6, 4, 4), layout=layout, device=backend.device) * 2.0**100
    exact = reference.pixel_norm(x.double())
    testing.check(_kernel(x), exact, [reference.pixel_norm(x * 2.0**-100, 0.0)])


def test_channels_have_unit_mean_square(backend):
    y = U.pixel_norm(testing.make((2, 9, 4, 4), device=backend.device), eps=0.0)
    mean_square = y.square().mean(1)
    testing.check(mean_square, torch.ones_like(mean_square), [], reduction=9)


def test_gradcheck_on_the_kernel():
    for layout in ("contiguous", "channels_last"):
        x = testing.make((2, 5, 2, 2), torch.float64, layout=layout).requires_grad_()
        assert torch.autograd.gradcheck(_kernel, [x])
        assert torch.autograd.gradgradcheck(_kernel, [x])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic, layout):
    inputs = [[testing.make((2, 6, n, 5), layout=layout)] for n in (4, 7)]
    assert_compiles(_kernel, inputs, OPS, "aot_eager", dynamic)


def test_compiled_by_inductor():
    assert_compiles(_kernel, [[testing.make((2, 6, 4, 5))]], OPS, "inductor", False)


def test_opcheck():
    op = torch.ops.udlkernels
    for shape, layout in [((2, 6, 3, 4), name) for name in testing.LAYOUTS] + [((5, 8), "sliced")]:
        x = testing.make(shape, layout=layout)
        y, rstd = op.pixel_norm_fwd(x, 1e-8)
        assert_opcheck(op.pixel_norm_fwd, (x, 1e-8))
        assert_opcheck(op.pixel_norm_bwd, (y, x, rstd, 1e-8))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_at_any_thread_count(dtype_any, layout):
    assert_deterministic(_kernel, [testing.make((3, 40, 30, 31), dtype_any, layout=layout)])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_do_not_depend_on_each_other(backend, dtype, layout):
    shape = (5, 6, 3, 3) if backend.small else (9, 20, 11, 7)
    x = testing.make(shape, dtype, layout=layout, device=backend.device)
    assert_rows_independent(_kernel, [x])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input=torch.ones(8)), "input: expected"),
        (dict(input=torch.ones(2, 8).int()), "input: expected"),
        (dict(eps=-1.0), "eps: expected"),
        (dict(eps=float("inf")), "eps: expected"),
        (dict(implementation="torch"), "PyTorch has no such op"),
        (dict(implementation="fast"), "implementation: expected"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.pixel_norm(**(dict(input=torch.ones(2, 3, 8)) | change))


def test_no_elements_and_explain():
    assert U.pixel_norm(torch.ones(2, 4, 0)).shape == (2, 4, 0)
    choice = udlkernels.explain(U.pixel_norm, torch.ones(2, 4, 0)).choices[0]
    assert choice.implementation == "reference" and "no elements" in str(choice)
