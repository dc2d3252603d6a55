"""act_norm: values, gradients, layouts, compilation, determinism, the module, errors."""

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
from udlkernels.normalization.act_norm import reference

# Planes of one, few and many positions take different loops.
SHAPES = [(2, 7, 5), (3, 70, 33, 9), (5, 16), (100, 30, 3), (2, 3, 4, 100), (2, 5, 1, 1)]
SMALL = [(2, 7, 5), (5, 16), (2, 3, 3, 3)]
OPS = "act_norm_fwd", "act_norm_bwd"


def _inputs(shape, dtype=torch.float32, device="cpu", layout="contiguous", param_dtype=None, **kw):
    params = dict(dtype=param_dtype or dtype, device=device)
    return [
        testing.make(shape, dtype, layout=layout, device=device, **kw),
        testing.make(shape[1:2], seed=1, **params) * 0.25,
        testing.make(shape[1:2], seed=2, **params),
    ]


def _kernel(*inputs):
    return U.act_norm(*inputs, implementation="kernel")


def _compare(inputs, gradients=True):
    return testing.compare(_kernel, reference.act_norm, [], inputs, gradients=gradients)


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        for layout in ("contiguous", "channels_last"):
            _compare(_inputs(shape, dtype, every_backend.device, layout))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in SMALL if backend.small else SHAPES:
        y = _compare(_inputs(shape, dtype, backend.device, layout)).outputs[0]
        assert y.stride() == empty_channels(testing.make(shape, layout=layout)).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values, layout):
    inputs = _inputs((2, 9, 5, 6), dtype, backend.device, layout, values=values)
    _compare(inputs, gradients=values != "nonfinite")


def test_sixteen_bit_input_with_wider_parameters(backend):
    inputs = _inputs((2, 5, 3, 3), torch.float16, backend.device, param_dtype=torch.float32)
    ours = _compare(inputs)
    assert [g.dtype for g in ours.gradients] == [torch.float16, torch.float32, torch.float32]
    assert ours.outputs[1].dtype == torch.float32


def test_log_determinant_is_that_of_the_jacobian():
    x, log_scale, bias = _inputs((1, 3, 2), torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: _kernel(t, log_scale, bias)[0], x)
    exact = torch.linalg.slogdet(jacobian.reshape(6, 6)).logabsdet.reshape(1)
    testing.check(_kernel(x, log_scale, bias)[1], exact, [], reduction=6)


@pytest.mark.parametrize("which", range(3), ids=["input", "log_scale", "bias"])
def test_each_gradient_alone(backend, which):
    inputs = _inputs((2, 5, 3, 3), torch.float32, backend.device)
    everything = testing.run(_kernel, inputs).gradients
    inputs[which] = inputs[which].detach().requires_grad_()
    outputs = _kernel(*inputs)
    torch.autograd.backward(
        [o for o in outputs if o.requires_grad],
        [
            c
            for c, o in zip(testing.make_cotangents(outputs), outputs, strict=True)
            if o.requires_grad
        ],
    )
    assert torch.equal(inputs[which].grad, everything[which])


def test_gradcheck_on_the_kernel():
    for layout in ("contiguous", "channels_last"):
        inputs = _inputs((2, 3, 2, 2), torch.float64, layout=layout)
        leaves = [t.detach().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(_kernel, leaves)
        assert torch.autograd.gradgradcheck(_kernel, leaves)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic, layout):
    inputs = [_inputs((2, 6, n, 5), layout=layout) for n in (4, 7)]
    assert_compiles(_kernel, inputs, OPS, "aot_eager", dynamic)


def test_compiled_by_inductor():
    assert_compiles(_kernel, [_inputs((2, 6, 4, 5))], OPS, "inductor", False)


def test_opcheck():
    op = torch.ops.udlkernels
    for shape, layout in [((2, 6, 3, 4), name) for name in testing.LAYOUTS] + [((5, 8), "sliced")]:
        inputs = _inputs(shape, layout=layout)
        y, logdet = op.act_norm_fwd(*inputs)
        assert_opcheck(op.act_norm_fwd, tuple(inputs))
        assert_opcheck(op.act_norm_bwd, (y, logdet, *inputs, True))
        assert_opcheck(op.act_norm_bwd, (y, logdet, *inputs, False))


@pytest.mark.parametrize("shape", [(300, 40), (60, 20, 3), (6, 20, 90, 30)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_at_any_thread_count(dtype_any, layout, shape):
    assert_deterministic(_kernel, _inputs(shape, dtype_any, layout=layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_do_not_depend_on_each_other(backend, dtype, layout):
    shape = (5, 6, 3, 3) if backend.small else (9, 20, 11, 7)
    inputs = _inputs(shape, dtype, backend.device, layout)
    assert_rows_independent(_kernel, inputs)


def test_module_normalises_its_first_batch_and_inverts():
    module = udlkernels.nn.ActNorm(4)
    x = testing.make((8, 4, 5, 5)) * 3 + 2
    y, logdet = module(x)
    variance, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    testing.check(1 + mean.float(), torch.ones(4), [], reduction=200)
    testing.check(variance.float(), torch.ones(4), [], reduction=200)
    back, inverse_logdet = module.inverse(y)
    testing.check(back, x.double(), [], reduction=200)
    assert torch.equal(inverse_logdet, -logdet)
    module(x * 2)
    assert torch.equal(module(x)[0], y), "only the first batch counts"


def test_module_keeps_what_it_learned():
    module, other = udlkernels.nn.ActNorm(4), udlkernels.nn.ActNorm(4)
    x = testing.make((8, 4, 5))
    module(x)
    assert set(module.state_dict()) == {"log_scale", "bias", "initialized"}
    other(x + 9)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], module(x)[0])
    fresh = udlkernels.nn.ActNorm(4)
    other.load_state_dict(fresh.state_dict())
    other(x + 9)
    assert not torch.equal(other.bias, fresh.bias), "loaded as not initialised, it starts anew"
    with pytest.raises(udlkernels.ArgumentError, match="input: expected"):
        fresh(torch.ones(2, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input=torch.ones(8)), "input: expected"),
        (dict(input=torch.ones(2, 3, 8).int()), "input: expected"),
        (dict(log_scale=torch.ones(4)), "log_scale: expected"),
        (dict(bias=torch.ones(1, 3)), "bias: expected"),
        (dict(bias=torch.ones(3, device="meta")), "bias: expected"),
        (dict(bias=torch.ones(3).int()), "bias: expected"),
        (dict(implementation="torch"), "PyTorch has no such op"),
        (dict(implementation="fast"), "implementation: expected"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(change, message):
    arguments = dict(input=torch.ones(2, 3, 8), log_scale=torch.ones(3), bias=torch.ones(3))
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.act_norm(**(arguments | change))


def test_no_elements():
    y, logdet = U.act_norm(torch.ones(2, 3, 0), torch.ones(3), torch.ones(3))
    assert y.shape == (2, 3, 0) and not logdet.any()
