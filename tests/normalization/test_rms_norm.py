"""rms_norm and add_rms_norm: values, gradients, options, compilation, determinism, bad input."""

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
from udlkernels.normalization.rms_norm import reference

EPS = 1e-5
SHAPES = [
    (4, 8),
    (3, 1),
    (1, 7),
    (5, 63),
    (2, 3, 65),
    (70, 33),
    (150, 7),
    (70, 16),
    (3, 1200),
    (2, 5001),
]
SMALL = [(4, 8), (3, 1), (2, 3, 65)]


def _inputs(shape, dtype=torch.float32, device="cpu", layout="contiguous", values="normal"):
    x = testing.make(shape, dtype, values, layout, device)
    return [x, testing.make(shape[-1:], dtype, device=device, seed=1)]


def _kernel(x, w):
    return U.rms_norm(x, x.shape[-1:], w, EPS, implementation="kernel")


def _oracle(x, w):
    return reference.rms_norm(x, x.shape[-1:], w, EPS)


def _torch(x, w):
    return F.rms_norm(x, x.shape[-1:], w, EPS)


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        if shape[-1] == 1 and dtype == torch.float64:
            continue  # 1 - x_hat^2 cancels there: the oracle has no more digits than the kernel
        testing.compare(_kernel, _oracle, [_torch], _inputs(shape, dtype, every_backend.device))


def test_rows_wider_than_a_block(backend):
    shape = (2, 9001) if backend.small else (3, 40000)
    testing.compare(_kernel, _oracle, [_torch], _inputs(shape, device=backend.device))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in [(4, 3, 40)] if backend.small else [(4, 3, 40), (2, 3, 4, 65)]:
        inputs = _inputs(shape, dtype, backend.device, layout)
        assert testing.compare(_kernel, _oracle, [_torch], inputs).outputs[0].is_contiguous()


def test_heads_of_a_packed_projection_are_read_in_place(backend):
    packed = testing.make((2, 5, 3 * 4 * 16), device=backend.device)
    heads = packed[..., 64:128].view(2, 5, 4, 16)
    testing.compare(_kernel, _oracle, [_torch], [heads, testing.make((16,), device=backend.device)])


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    inputs = _inputs((6, 96), dtype, backend.device, values=values)
    testing.compare(_kernel, _oracle, [_torch], inputs, gradients=values != "nonfinite")


def test_squares_that_overflow_are_rescaled(backend):
    x = testing.make((3, 64), device=backend.device)
    y = U.rms_norm(x * 2.0**100, (64,), eps=0.0, implementation="kernel")
    testing.check(y, reference.rms_norm(x.double(), (64,), eps=0.0), [F.rms_norm(x, (64,), eps=0)])


def test_eps_defaults_to_that_of_the_computing_type(backend, dtype):
    x = testing.make((5, 24), dtype, device=backend.device) * 1e-3
    ours = U.rms_norm(x, (24,), implementation="kernel")
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    oracle = reference.rms_norm(x.double(), (24,), eps=eps)
    testing.check(ours, oracle, [F.rms_norm(x, (24,))])


def test_sixteen_bit_input_with_wider_weight(backend, dtype):
    x = testing.make((9, 40), dtype, device=backend.device)
    w = testing.make((40,), torch.float32, device=backend.device, seed=1)
    ours = testing.compare(_kernel, _oracle, [], [x, w])
    assert ours.outputs[0].dtype == dtype and ours.gradients[1].dtype == torch.float32


def test_weight_offset(backend, dtype):
    def kernel(x, w):
        return U.rms_norm(x, (40,), w, EPS, weight_offset=1.0, implementation="kernel")

    def oracle(x, w):
        return reference.rms_norm(x, (40,), w, EPS, weight_offset=1.0)

    inputs = _inputs((70, 40), dtype, backend.device)
    testing.compare(kernel, oracle, [], inputs)
    x, w = inputs
    plain = U.rms_norm(x, (40,), w.double().add(1), EPS, implementation="kernel")
    assert torch.equal(kernel(x, w), plain) or dtype == torch.float64


def test_cast_before_weight_rounds_twice(backend, dtype):
    x, w = _inputs((70, 40), dtype, backend.device)
    args = dict(eps=EPS, cast="before_weight")
    ours = U.rms_norm(x, (40,), w, **args, implementation="kernel")
    once = _kernel(x, w)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(ours, once)
    else:
        llama = F.rms_norm(x, (40,), eps=EPS) * w
        assert (ours == llama).double().mean() > 0.98 > (once == llama).double().mean()


def test_each_gradient_alone(backend):
    everything = testing.run(_kernel, _inputs((7, 20), device=backend.device)).gradients
    for i in range(2):
        inputs = _inputs((7, 20), device=backend.device)
        inputs[i].requires_grad_()
        y = _kernel(*inputs)
        y.backward(testing.make_cotangents([y])[0])
        assert torch.equal(inputs[i].grad, everything[i]) and inputs[1 - i].grad is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_add_rms_norm(backend, dtype, dropout_p, weight_offset):
    seed = torch.tensor([-7], device=backend.device)
    for shape in [(5, 40)] if backend.small else [(5, 40), (130, 65), (3, 5001)]:
        x, w = _inputs(shape, dtype, backend.device)
        residual = testing.make(shape, dtype, device=backend.device, layout="sliced", seed=9)
        testing.compare(
            lambda x, r, w: U.add_rms_norm(
                x, r, x.shape[-1:], w, eps=EPS, dropout_p=dropout_p, seed=seed,
                weight_offset=weight_offset, implementation="kernel",
            ),
            lambda x, r, w: reference.add_rms_norm(
                x, r, x.shape[-1:], w, EPS, dropout_p, seed, weight_offset
            ),
            [],
            [x, residual, w],
        )  # fmt: skip


def test_gradcheck_on_the_kernel():
    x, w = (t.requires_grad_() for t in _inputs((3, 11), torch.float64))
    residual = testing.make((3, 11), torch.float64, seed=9).requires_grad_()

    def fused(x, r, w):
        return U.add_rms_norm(
            x, r, (11,), w, dropout_p=0.4, seed=torch.tensor([5]), implementation="kernel"
        )

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(_kernel, [x, w])
        assert check(fused, [x, residual, w])


def test_second_derivative_counts_a_weight_made_from_the_input_once():
    x = testing.make((3, 5), torch.float64).requires_grad_()

    def penalty(norm):
        w = x.mean(0)
        gradient = torch.autograd.grad(norm(x, w).sin().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    testing.check(penalty(_kernel), penalty(_oracle), [penalty(_torch)])


def test_checkpointing_recomputes_the_same():
    x, w = (t.requires_grad_() for t in _inputs((4, 8)))
    plain = torch.autograd.grad(_kernel(x, w).square().sum(), [x, w])
    again = torch.utils.checkpoint.checkpoint(_kernel, x, w, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(again.square().sum(), [x, w]), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_transforms_and_complex_inputs_take_another_implementation():
    x, w = _inputs((4, 8))
    gradient = torch.func.grad(lambda t: U.rms_norm(t, (8,), w).square().sum())(x)
    expected = torch.func.grad(lambda t: F.rms_norm(t, (8,), w).square().sum())(x)
    assert torch.equal(gradient, expected)
    z = torch.complex(x, x.flip(0))
    assert torch.equal(U.rms_norm(z, (8,)), F.rms_norm(z, (8,)))


def test_autocast_keeps_torchs_result_type():
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for x in (torch.randn(4, 8), torch.randn(4, 8).to(dtype)):
                assert U.rms_norm(x, (8,)).dtype == F.rms_norm(x, (8,)).dtype


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = udlkernels.nn.RMSNorm(8)

        def forward(self, x):
            return self.norm(x)

    model, x = Model(), torch.randn(4, 8)
    exported = torch.export.export(model, (x,))
    assert any("udlkernels.rms_norm_fwd" in str(n.target) for n in exported.graph.nodes)
    assert torch.equal(exported.module()(x), model(x))


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    inputs = [_inputs((rows, 40)) for rows in (6, 9)]
    assert_compiles(_kernel, inputs, ("rms_norm_fwd", "rms_norm_bwd"), name, shapes == "dynamic")


def test_fused_compiled():
    def fused(x, r, w):
        y, s = U.add_rms_norm(x, r, (40,), w, dropout_p=0.2, implementation="kernel")
        return y * s

    x, w = _inputs((6, 40))
    assert_compiles(fused, [[x, x.clone(), w]], ("add_rms_norm_fwd", "add_rms_norm_bwd"))


def test_opcheck():
    x, w = _inputs((6, 40))
    op = torch.ops.udlkernels
    y, rstd = op.rms_norm_fwd(x, w, 40, EPS, 0.0, False)
    assert_opcheck(op.rms_norm_fwd, (x, w, 40, EPS, 1.0, True))
    assert_opcheck(op.rms_norm_fwd, (x.t().contiguous().t(), None, 40, EPS, 0.0, False))
    assert_opcheck(op.rms_norm_bwd, (y, x, w, rstd, 40, 0.0, True, False))
    seed = torch.tensor([5])
    assert_opcheck(op.add_rms_norm_fwd, (x, x, w, 40, EPS, 0.0, False, 0.1, seed))
    assert_opcheck(op.add_rms_norm_bwd, (y, y, x, w, rstd, 40, 0.0, 0.1, seed, True))


def test_same_bits_at_any_thread_count(dtype_any):
    for shape in [(300, 768), (1000, 33), (9000, 7), (70, 5001)]:
        assert_deterministic(_kernel, _inputs(shape, dtype_any))


def test_rows_do_not_depend_on_each_other(backend, dtype):
    for shape in [(9, 40)] if backend.small else [(131, 200), (131, 7)]:
        assert_rows_independent(_kernel, _inputs(shape, dtype, backend.device))


def test_module_is_torchs():
    ours, theirs = udlkernels.nn.RMSNorm((4, 6), eps=1e-3), torch.nn.RMSNorm((4, 6), eps=1e-3)
    assert isinstance(ours, torch.nn.RMSNorm)
    theirs.load_state_dict(ours.state_dict())
    x = testing.make((5, 4, 6))
    testing.check(ours(x), theirs.double()(x.double()), [torch.nn.RMSNorm((4, 6), eps=1e-3)(x)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(cast="first"), r"\[rms_norm\] cast: expected one of"),
        (dict(implementation="fast"), r"\[rms_norm\] implementation: expected one of"),
        (dict(weight=torch.ones(7), implementation="kernel"), "weight has shape"),
        (dict(weight=torch.ones(8), weight_offset=1.0, implementation="torch"), "weight_offset"),
    ],
    ids=["cast", "name", "kernel", "torch"],
)
def test_bad_options(kwargs, message):
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.rms_norm(torch.ones(4, 8), (8,), **kwargs)


def test_bad_input_gives_torchs_own_answer():
    x = testing.make((4, 8))
    for args in [(x, (7,)), (x, (8,), torch.ones(7)), (x, ()), (x.int(), (8,)), (x, 8)]:
        with pytest.raises(Exception) as ours:
            U.rms_norm(*args)
        with pytest.raises(Exception) as theirs:
            F.rms_norm(*args)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
