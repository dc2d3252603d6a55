"""center_rows: values, gradients, layouts, compilation, determinism, errors."""

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
from udlkernels.normalization.center_rows import reference


def _kernel(x):
    return U.center_rows(x, implementation="kernel")


def test_values_and_gradients(every_backend, dtype):
    for shape in [(4, 8), (3, 1), (2, 3, 65)]:
        x = testing.make(shape, dtype, device=every_backend.device)
        testing.compare(_kernel, reference.center_rows, [], [x])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, layout):
    x = testing.make((4, 3, 40), layout=layout, device=backend.device)
    assert testing.compare(_kernel, reference.center_rows, [], [x]).outputs[0].is_contiguous()


def test_gradcheck_on_the_kernel():
    x = testing.make((3, 11), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(_kernel, x)
    assert torch.autograd.gradgradcheck(_kernel, x)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic):
    inputs = [[testing.make((rows, 40))] for rows in (6, 9)]
    assert_compiles(_kernel, inputs, ("center_rows_fwd", "center_rows_fwd"), dynamic=dynamic)


def test_opcheck():
    op = torch.ops.udlkernels
    x = testing.make((6, 40))
    assert_opcheck(op.center_rows_fwd, (x,))
    assert_opcheck(op.center_rows_fwd, (x.t().contiguous().t(),))


def test_same_bits_at_any_thread_count(dtype_any):
    assert_deterministic(_kernel, [testing.make((300, 768), dtype_any)])


def test_rows_do_not_depend_on_each_other(backend):
    assert_rows_independent(_kernel, [testing.make((9, 40), device=backend.device)])


@pytest.mark.parametrize("input", [torch.ones(4, 8).int(), torch.tensor(1.0)], ids=["int", "0-d"])
def test_bad_input(input):
    with pytest.raises(udlkernels.ArgumentError, match="input: expected a floating"):
        U.center_rows(input)
