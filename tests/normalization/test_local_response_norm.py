"""local_response_norm: values, gradients, layouts, compilation, determinism, errors."""

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
from udlkernels.normalization._channels import empty_channels
from udlkernels.normalization.local_response_norm import reference

SHAPES = [(2, 7, 5, 6), (3, 33, 40), (2, 3, 2, 3, 4), (1, 40, 1, 1), (2, 1, 3, 3), (2, 6, 17, 33)]
SMALL = [(2, 7, 3, 3), (1, 5, 4)]


def _compare(shape, dtype, device, size=5, alpha=0.1, beta=0.75, k=1.0, **made):
    options = size, alpha, beta, k
    gradients = made.pop("gradients", True)
    return testing.compare(
        lambda x: U.local_response_norm(x, *options, implementation="kernel"),
        lambda x: reference.local_response_norm(x, *options),
        [lambda x: F.local_response_norm(x, *options)],
        [testing.make(shape, dtype, device=device, **made)],
        gradients=gradients,
    )


def _kernel(x):
    return U.local_response_norm(x, 5, 0.1, implementation="kernel")


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        for size in (2, 5) if every_backend.small else (1, 2, 5, 8, 13, 100):
            _compare(shape, dtype, every_backend.device, size)


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0, 0.6, 2.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_exponents(backend, dtype, beta, layout):
    _compare((2, 9, 3, 3), dtype, backend.device, 4, beta=beta, k=2.0, layout=layout)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in SMALL if backend.small else SHAPES:
        y = _compare(shape, dtype, backend.device, layout=layout).outputs[0]
        assert y.stride() == empty_channels(testing.make(shape, layout=layout)).stride()


@pytest.mark.parametrize("values", testing.VALUES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values(backend, dtype, values, layout):
    if dtype == torch.bfloat16 and values == "denormal":
        pytest.skip("not a supported value: bfloat16 results below 2^-126 become zero")
    # A second power of a value whose square is near the limit is beyond the interpreter's float32.
    large = values == "large" and backend.device == "cpu" and not backend.small
    gradients = values != "nonfinite" and (values != "large" or large)
    _compare((2, 9, 5, 6), dtype, backend.device, values=values, layout=layout, gradients=gradients)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_squares_that_overflow_are_redone(layout):
    x = testing.make((2, 6, 4, 4), layout=layout) * 1e24
    ours = testing.run(_kernel, [x])
    exact = testing.run(lambda x: reference.local_response_norm(x, 5, 0.1), [x.double()])
    testing.check(ours.outputs[0], exact.outputs[0], [])
    testing.check(ours.gradients[0], exact.gradients[0], [])


def test_gradcheck_on_the_kernel():
    x = testing.make((2, 6, 2, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(_kernel, [x])
    assert torch.autograd.gradgradcheck(_kernel, [x])


def test_a_gradient_in_another_layout():
    x = testing.make((2, 6, 4, 5), layout="channels_last").requires_grad_()
    dy = testing.make((2, 6, 4, 5), seed=1)
    found = [torch.autograd.grad(_kernel(x), x, testing.lay_out(dy, name))[0]
             for name in ("contiguous", "channels_last", "sliced")]  # fmt: skip
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_functorch_takes_another_implementation():
    x = testing.make((3, 2, 6, 4))
    mapped = torch.func.vmap(lambda t: U.local_response_norm(t[None], 5))(x)
    testing.check(mapped[:, 0], F.local_response_norm(x.double(), 5), [F.local_response_norm(x, 5)])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic, layout):
    ops = "local_response_norm_fwd", "local_response_norm_bwd"
    inputs = [[testing.make((2, 6, n, 5), layout=layout)] for n in (4, 7)]
    assert_compiles(_kernel, inputs, ops, "aot_eager", dynamic)


def test_compiled_by_inductor():
    ops = "local_response_norm_fwd", "local_response_norm_bwd"
    assert_compiles(_kernel, [[testing.make((2, 6, 4, 5))]], ops, "inductor", False)


def test_opcheck():
    op = torch.ops.udlkernels
    for layout in ("contiguous", "channels_last", "transposed", "sliced"):
        x = testing.make((2, 6, 3, 4), layout=layout)
        assert_opcheck(op.local_response_norm_fwd, (x, 5, 0.1, 0.75, 1.0))
        assert_opcheck(op.local_response_norm_bwd, (x, x, 5, 0.1, 0.75, 1.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_at_any_thread_count(dtype_any, layout):
    assert_deterministic(_kernel, [testing.make((3, 40, 30, 31), dtype_any, layout=layout)])


def test_samples_do_not_depend_on_each_other(backend, dtype):
    shape = (5, 6, 3, 3) if backend.small else (9, 20, 11, 7)
    assert_rows_independent(_kernel, [testing.make(shape, dtype, device=backend.device)])


def test_module_is_torchs():
    ours, theirs = udlkernels.nn.LocalResponseNorm(3, k=2.0), torch.nn.LocalResponseNorm(3, k=2.0)
    x = testing.make((2, 6, 4, 4))
    assert isinstance(ours, torch.nn.LocalResponseNorm)
    testing.check(ours(x), theirs(x.double()), [theirs(x)])
    ours.implementation = "torch"
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_types_that_pytorch_lacks(dtype16):
    x = testing.make((2, 6, 4, 4), dtype16)
    assert udlkernels.explain(U.local_response_norm, x, 5).choices[0].implementation == "kernel"
    with pytest.raises(udlkernels.ArgumentError, match="on the CPU"):
        U.local_response_norm(x, 5, implementation="torch")


@pytest.mark.parametrize(
    ("shape", "size"), [((4, 8), 5), ((2, 4, 8), 0), ((2, 4, 8), -1), ((2, 4, 8), 2.5), ((), 5)]
)
def test_bad_input_gives_torchs_own_answer(shape, size):
    with pytest.raises(Exception) as ours:
        U.local_response_norm(torch.ones(shape), size)
    with pytest.raises(Exception) as theirs:
        F.local_response_norm(torch.ones(shape), size)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(udlkernels.ArgumentError):
        U.local_response_norm(torch.ones(shape), size, implementation="kernel")


def test_no_elements():
    assert U.local_response_norm(torch.ones(0, 4, 3), 5).shape == (0, 4, 3)
