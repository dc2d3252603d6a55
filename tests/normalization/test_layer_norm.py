"""layer_norm and add_layer_norm: values, gradients, layouts, compilation, determinism, errors."""

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
from udlkernels.normalization.layer_norm import reference

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


def _inputs(shape, dtype, device, layout="contiguous", values="normal", param_dtype=None):
    n = shape[-1]
    return [
        testing.make(shape, dtype, values, layout, device),
        testing.make((n,), param_dtype or dtype, device=device, seed=1),
        testing.make((n,), param_dtype or dtype, device=device, seed=2),
    ]


def _kernel(x, w, b):
    return U.layer_norm(x, x.shape[-1:], w, b, implementation="kernel")


def _oracle(x, w, b):
    return reference.layer_norm(x, x.shape[-1:], w, b)


def _torch(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b)


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        testing.compare(_kernel, _oracle, [_torch], _inputs(shape, dtype, every_backend.device))


def test_rows_wider_than_a_block(backend):
    shape = (2, 9001) if backend.small else (3, 40000)
    testing.compare(_kernel, _oracle, [_torch], _inputs(shape, torch.float32, backend.device))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in [(4, 3, 40)] if backend.small else [(4, 3, 40), (2, 3, 4, 65), (66, 17)]:
        inputs = _inputs(shape, dtype, backend.device, layout)
        ours = testing.compare(_kernel, _oracle, [_torch], inputs)
        assert ours.outputs[0].is_contiguous()


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    inputs = _inputs((6, 96), dtype, backend.device, values=values)
    gradients = values != "nonfinite"
    testing.compare(_kernel, _oracle, [_torch], inputs, gradients=gradients)


def test_squares_that_overflow_are_rescaled(backend):
    x = testing.make((3, 64), device=backend.device)
    huge = (x * 2.0**100).clone()
    y = U.layer_norm(huge, (64,), implementation="kernel")
    testing.check(
        y, reference.layer_norm(x.double(), (64,), eps=0.0), [F.layer_norm(x, (64,), eps=0)]
    )


@pytest.mark.parametrize("params", ["none", "weight", "bias"])
def test_optional_parameters(backend, dtype, params):
    x, w, b = _inputs((9, 40), dtype, backend.device)
    inputs = [x, w if params == "weight" else None, b if params == "bias" else None]
    testing.compare(_kernel, _oracle, [_torch], inputs)


def test_sixteen_bit_input_with_wider_parameters(backend, dtype):
    if dtype in (torch.float16, torch.bfloat16):
        inputs = _inputs((9, 40), dtype, backend.device, param_dtype=torch.float32)
        ours = testing.compare(_kernel, _oracle, [_torch], inputs)
        assert [g.dtype for g in ours.gradients] == [dtype, torch.float32, torch.float32]
    else:
        inputs = _inputs((9, 40), dtype, backend.device, param_dtype=torch.float64)
        assert testing.compare(_kernel, _oracle, [], inputs).outputs[0].dtype == dtype


def test_several_normalized_dimensions(backend):
    x = testing.make((3, 4, 5, 6), device=backend.device)
    w, b = (testing.make((5, 6), device=backend.device, seed=s) for s in (1, 2))
    testing.compare(
        lambda x, w, b: U.layer_norm(x, (5, 6), w, b, implementation="kernel"),
        lambda x, w, b: reference.layer_norm(x, (5, 6), w, b),
        [lambda x, w, b: F.layer_norm(x, (5, 6), w, b)],
        [x, w, b],
    )


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_each_gradient_alone(backend, wanted):
    inputs = _inputs((7, 20), torch.float32, backend.device)
    everything = testing.run(_kernel, inputs).gradients
    leaves = [t.requires_grad_(want) for t, want in zip(inputs, wanted, strict=True)]
    y = _kernel(*leaves)
    y.backward(testing.make_cotangents([y])[0])
    for leaf, want, expected in zip(leaves, wanted, everything, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            assert torch.equal(leaf.grad, expected)


def test_shift_and_scale_invariance(backend):
    x = testing.make((5, 50), torch.float32, device=backend.device)
    once = U.layer_norm(x, (50,), eps=0.0, implementation="kernel")
    again = U.layer_norm(x * 4 + 8, (50,), eps=0.0, implementation="kernel")
    testing.check(again, once, [F.layer_norm(x * 4 + 8, (50,), eps=0.0)])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_add_layer_norm(backend, dtype, dropout_p):
    seed = torch.tensor([2**40 + 5], device=backend.device)
    for shape in [(5, 40)] if backend.small else [(5, 40), (130, 65), (3, 5001)]:
        x, w, b = _inputs(shape, dtype, backend.device)
        residual = testing.make(shape, dtype, device=backend.device, layout="sliced", seed=9)
        testing.compare(
            lambda x, r, w, b: U.add_layer_norm(
                x, r, x.shape[-1:], w, b, dropout_p=dropout_p, seed=seed, implementation="kernel"
            ),
            lambda x, r, w, b: reference.add_layer_norm(
                x, r, x.shape[-1:], w, b, 1e-5, dropout_p, seed
            ),
            [],
            [x, residual, w, b],
        )


def test_add_layer_norm_passes_the_sum_on(backend):
    x, w, b = _inputs((6, 24), torch.float32, backend.device)
    residual = testing.make((6, 24), device=backend.device, seed=9)
    y, s = U.add_layer_norm(x, residual, (24,), w, b, implementation="kernel")
    assert torch.equal(s, x + residual)
    assert torch.equal(y, _kernel(s, w, b))
    leaf = x.clone().requires_grad_()
    _, s = U.add_layer_norm(leaf, residual, (24,), w, b, implementation="kernel")
    s.backward(torch.ones_like(s))
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_dropout_follows_the_generator_and_the_seed(backend):
    x = torch.ones(64, 64, device=backend.device)
    zero = torch.zeros_like(x)

    def dropped(**kwargs):
        s = U.add_layer_norm(x, zero, (64,), dropout_p=0.25, implementation="kernel", **kwargs)[1]
        return s == 0

    torch.manual_seed(3)
    first, second = dropped(), dropped()
    torch.manual_seed(3)
    assert torch.equal(first, dropped())
    assert not torch.equal(first, second)
    seed = torch.tensor([11], device=backend.device)
    assert torch.equal(dropped(seed=seed), dropped(seed=seed))
    assert 0.2 < first.double().mean().item() < 0.3


def test_gradcheck_on_the_kernel():
    inputs = [t.requires_grad_() for t in _inputs((3, 11), torch.float64, "cpu")]
    assert torch.autograd.gradcheck(_kernel, inputs)
    assert torch.autograd.gradgradcheck(_kernel, inputs)
    residual = testing.make((3, 11), torch.float64, seed=9).requires_grad_()
    seed = torch.tensor([5])

    def fused(x, r, w, b):
        return U.add_layer_norm(
            x, r, (11,), w, b, dropout_p=0.4, seed=seed, implementation="kernel"
        )

    assert torch.autograd.gradcheck(fused, [inputs[0], residual, *inputs[1:]])
    assert torch.autograd.gradgradcheck(fused, [inputs[0], residual, *inputs[1:]])


def test_functorch_and_forward_mode_take_another_implementation():
    x, w, b = _inputs((4, 3, 8), torch.float32, "cpu")
    mapped = torch.func.vmap(lambda row: U.layer_norm(row, (8,), w, b))(x)
    testing.check(mapped, _oracle(x.double(), w.double(), b.double()), [_torch(x, w, b)])
    _, tangent = torch.func.jvp(lambda t: U.layer_norm(t, (8,), w, b), (x,), (x,))
    _, expected = torch.func.jvp(lambda t: F.layer_norm(t, (8,), w, b), (x,), (x,))
    assert torch.equal(tangent, expected)


@pytest.mark.parametrize("backend_name", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(backend_name, dynamic):
    if backend_name == "inductor" and dynamic:
        pytest.skip("Inductor on one shape an op: its code is generated on the CPU device")
    ops = ("layer_norm_fwd", "layer_norm_bwd")
    inputs = [_inputs((rows, 40), torch.float32, "cpu") for rows in (6, 9)]
    assert_compiles(_kernel, inputs, ops, backend_name, dynamic)


def test_fused_compiled():
    def fused(x, r, w, b):
        y, s = U.add_layer_norm(x, r, (40,), w, b, dropout_p=0.2, implementation="kernel")
        return y + s

    x, w, b = _inputs((6, 40), torch.float32, "cpu")
    ops = ("add_layer_norm_fwd", "add_layer_norm_bwd")
    assert_compiles(fused, [[x, x.clone(), w, b]], ops, "aot_eager", False)


def test_opcheck():
    x, w, b = _inputs((6, 40), torch.float32, "cpu")
    op = torch.ops.udlkernels
    y, stats = op.layer_norm_fwd(x, w, b, 40, 1e-5)
    assert_opcheck(op.layer_norm_fwd, (x, w, b, 40, 1e-5))
    assert_opcheck(op.layer_norm_fwd, (x.t().contiguous().t(), None, b, 40, 1e-5))
    assert_opcheck(op.layer_norm_bwd, (y, x, w, b, stats, 40, True, True, True))
    assert_opcheck(op.layer_norm_bwd, (y, x, w, b, stats, 40, True, False, False))
    seed = torch.tensor([5])
    y, s, stats = op.add_layer_norm_fwd(x, x, w, b, 40, 1e-5, 0.1, seed)
    assert_opcheck(op.add_layer_norm_fwd, (x, x, w, b, 40, 1e-5, 0.1, seed))
    assert_opcheck(op.add_layer_norm_bwd, (y, s, s, w, b, stats, 40, 0.1, seed, True, True))


def test_same_bits_at_any_thread_count(dtype_any):
    for shape in [(300, 768), (1000, 33), (9000, 7), (70, 5001)]:
        assert_deterministic(_kernel, _inputs(shape, dtype_any, "cpu"))


def test_rows_do_not_depend_on_each_other(backend, dtype):
    for shape in [(9, 40)] if backend.small else [(131, 200), (131, 7)]:
        assert_rows_independent(_kernel, _inputs(shape, dtype, backend.device))


def test_module_is_torchs():
    ours = udlkernels.nn.LayerNorm((4, 6), eps=1e-3)
    theirs = torch.nn.LayerNorm((4, 6), eps=1e-3)
    assert isinstance(ours, torch.nn.LayerNorm)
    theirs.load_state_dict(ours.state_dict())
    x = testing.make((5, 4, 6))
    testing.compare(ours, theirs.double(), [torch.nn.LayerNorm((4, 6), eps=1e-3)], [x])
    ours.implementation = "reference"
    choice = udlkernels.explain(ours, x).choices[0]
    assert (choice.op, choice.implementation) == ("layer_norm", "reference")


def test_bad_input_gives_torchs_own_answer():
    x = testing.make((4, 8))
    for call in (
        lambda f: f(x, (7,)),
        lambda f: f(x, ()),
        lambda f: f(x, (8,), torch.ones(7)),
        lambda f: f(x.int(), (8,)),
        lambda f: f(x, 8),
        lambda f: f(torch.tensor(1.0), (1,)),
    ):
        with pytest.raises(Exception) as ours:
            call(U.layer_norm)
        with pytest.raises(Exception) as theirs:
            call(F.layer_norm)
        assert type(ours.value) is type(theirs.value)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_no_elements(shape):
    x = torch.zeros(shape, requires_grad=True)
    w = torch.ones(shape[-1:], requires_grad=True)
    y = U.layer_norm(x, shape[-1:], w)
    y.sum().backward()
    assert y.shape == shape and not w.grad.any()


def test_forcing_the_kernel_says_why_it_cannot_serve():
    with pytest.raises(
        udlkernels.ArgumentError, match=r"\[layer_norm\] implementation.*weight has"
    ):
        U.layer_norm(torch.ones(4, 8), (8,), torch.ones(7), implementation="kernel")
    with pytest.raises(udlkernels.ArgumentError, match="one of"):
        U.layer_norm(torch.ones(4, 8), (8,), implementation="fast")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(residual=torch.ones(4, 7)), "residual: expected float32"),
        (dict(residual=torch.ones(4, 8).double()), "residual: expected float32"),
        (dict(normalized_shape=(9,)), "shapes: expected"),
        (dict(weight=torch.ones(7)), "weight has shape"),
        (dict(weight=torch.ones(8, device="meta")), "weight: expected a tensor on cpu"),
        (dict(eps=-1.0), "eps: expected"),
        (dict(eps=float("nan")), "eps: expected"),
        (dict(dropout_p=1.5), "dropout_p: expected"),
        (dict(seed=torch.ones(1)), "seed: expected an int64"),
        (dict(x=torch.ones(4, 8).int()), "x: expected a floating"),
        (dict(implementation="torch"), "PyTorch has no such op"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_to_add_layer_norm(change, message):
    arguments = dict(x=torch.ones(4, 8), residual=torch.ones(4, 8), normalized_shape=(8,)) | change
    with pytest.raises(udlkernels.ArgumentError, match=message):
        U.add_layer_norm(**arguments)
