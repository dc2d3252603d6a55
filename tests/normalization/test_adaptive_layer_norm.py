"""adaptive_layer_norm: values, gradients, layouts, compilation, determinism, errors."""

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
from udlkernels.normalization.adaptive_layer_norm import reference

SHAPES = [(2, 7, 5), (3, 70, 33), (5, 16), (2, 3, 4, 100), (1, 300, 64), (2, 2, 5001)]
SMALL = [(2, 3, 5), (3, 16), (2, 2, 2, 65)]
OPS = "adaptive_layer_norm_fwd", "adaptive_layer_norm_bwd"


def _inputs(shape, dtype=torch.float32, device="cpu", layout="contiguous", values="normal", **kw):
    params = kw.get("param_dtype", dtype)
    return [
        testing.make(shape, dtype, values, layout, device),
        testing.make((shape[0], shape[-1]), params, device=device, seed=1),
        testing.make((shape[0], shape[-1]), params, device=device, seed=2),
    ]


def _kernel(*inputs):
    return U.adaptive_layer_norm(*inputs, implementation="kernel")


def _unfused(x, scale, shift):
    rows = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    normal = torch.nn.functional.layer_norm(x, x.shape[-1:])
    return normal * (1 + scale.reshape(rows)) + shift.reshape(rows)


# The formula keeps 16-bit inputs in float32, PyTorch's ops round in between: the worse one counts.
_PEERS = [reference.adaptive_layer_norm, _unfused]


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        inputs = _inputs(shape, dtype, every_backend.device)
        testing.compare(_kernel, reference.adaptive_layer_norm, _PEERS, inputs)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in SMALL if backend.small else SHAPES[:4]:
        inputs = _inputs(shape, dtype, backend.device, layout)
        ours = testing.compare(_kernel, reference.adaptive_layer_norm, _PEERS, inputs)
        assert ours.outputs[0].is_contiguous()


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    inputs = _inputs((3, 4, 40), dtype, backend.device, values=values)
    gradients = values != "nonfinite"
    testing.compare(_kernel, reference.adaptive_layer_norm, _PEERS, inputs, gradients=gradients)


def test_sixteen_bit_input_with_wider_parameters(backend):
    inputs = _inputs((3, 4, 40), torch.float16, backend.device, param_dtype=torch.float32)
    ours = testing.compare(_kernel, reference.adaptive_layer_norm, _PEERS, inputs)
    assert [g.dtype for g in ours.gradients] == [torch.float16, torch.float32, torch.float32]


def test_equals_layer_norm_of_each_sample():
    x, scale, shift = _inputs((3, 20, 40))
    y = _kernel(x, scale, shift)
    for b in range(3):
        alone = U.layer_norm(x[b], (40,), 1 + scale[b], shift[b], implementation="kernel")
        assert torch.equal(y[b], alone)


@pytest.mark.parametrize("which", range(3), ids=["input", "scale", "shift"])
def test_each_gradient_alone(backend, which):
    inputs = _inputs((2, 5, 20), torch.float32, backend.device)
    everything = testing.run(_kernel, inputs).gradients
    inputs[which].requires_grad_()
    y = _kernel(*inputs)
    y.backward(testing.make_cotangents([y])[0])
    assert torch.equal(inputs[which].grad, everything[which])


def test_gradcheck_on_the_kernel():
    inputs = [t.requires_grad_() for t in _inputs((2, 3, 7), torch.float64)]
    assert torch.autograd.gradcheck(_kernel, inputs)
    assert torch.autograd.gradgradcheck(_kernel, inputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic):
    assert_compiles(_kernel, [_inputs((3, n, 40)) for n in (5, 8)], OPS, "aot_eager", dynamic)


def test_compiled_by_inductor():
    assert_compiles(_kernel, [_inputs((3, 5, 40))], OPS, "inductor", False)


def test_opcheck():
    op = torch.ops.udlkernels
    inputs = _inputs((3, 5, 40))
    y, stats = op.adaptive_layer_norm_fwd(*inputs, 1e-5)
    assert_opcheck(op.adaptive_layer_norm_fwd, (*inputs, 1e-5))
    assert_opcheck(op.adaptive_layer_norm_bwd, (y, *inputs, stats, True, True, True))
    assert_opcheck(op.adaptive_layer_norm_bwd, (y, *inputs, stats, False, True, False))


def test_same_bits_at_any_thread_count(dtype_any):
    assert_deterministic(_kernel, _inputs((3, 300, 200), dtype_any))


def test_samples_do_not_depend_on_each_other(backend, dtype):
    shape = (5, 3, 24) if backend.small else (9, 150, 200)
    assert_rows_independent(_kernel, _inputs(shape, dtype, backend.device), (0, 1, 2))


def test_functorch_takes_the_reference():
    x, scale, shift = _inputs((3, 2, 5, 8))
    mapped = torch.func.vmap(lambda t: U.adaptive_layer_norm(t, scale[:2], shift[:2]))(x)
    testing.check(
        mapped[1],
        reference.adaptive_layer_norm(x[1].double(), scale[:2].double(), shift[:2].double()),
        [reference.adaptive_layer_norm(x[1], scale[:2], shift[:2])],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input=torch.ones(8)), "input: expected"),
        (dict(input=torch.ones(2, 3, 8).int()), "input: expected"),
        (dict(scale=torch.ones(2, 7)), "scale: expected"),
        (dict(scale=torch.ones(8)), "scale: expected"),
        (dict(shift=torch.ones(3, 8)), "shift: expected"),
        (dict(shift=torch.ones(2, 8, device="meta")), "shift: expected"),
        (dict(shift=torch.ones(2, 8).int()), "shift: expected"),
        (dict(eps=-1.0), "eps: expected"),
        (dict(eps=float("nan")), "eps: expected"),
        (dict(implementation="torch"), "PyTorch has no such op"),
        (dict(implementation="fast"), "implementation: expected"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    arguments = dict(input=torch.ones(2, 3, 8), scale=torch.ones(2, 8), shift=torch.ones(2, 8))
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.adaptive_layer_norm(**(arguments | change))


def test_no_elements():
    y = U.adaptive_layer_norm(torch.ones(2, 0, 8), torch.ones(2, 8), torch.ones(2, 8))
    assert y.shape == (2, 0, 8)
