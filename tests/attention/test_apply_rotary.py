"""apply_rotary: values, gradients, both conventions, in place, layouts, compilation, errors."""

from __future__ import annotations

import functools
import math

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
from udlkernels.attention.apply_rotary import reference

# B, H, T, D and half of the width that turns.
SHAPES = [
    (2, 3, 5, 8, 4),
    (1, 2, 17, 128, 64),
    (3, 1, 33, 64, 16),
    (1, 2, 3, 70, 35),
    (2, 5, 1, 33, 1),
    (1, 1, 50, 258, 129),
    (1, 4, 20, 31, 11),
]
SMALL = [(2, 3, 5, 8, 4), (1, 2, 18, 20, 5)]
CONVENTIONS = [
    (interleaved, layout) for interleaved in (False, True) for layout in ("bhtd", "bthd")
]
OPS = "apply_rotary", "apply_rotary"


def _inputs(shape, dtype=torch.float32, device="cpu", *, layout="bhtd", memory="contiguous",
            values="normal", table_dtype=None, by_sample=False):  # fmt: skip
    b, h, t, d, half = shape
    size = (b, h, t, d) if layout == "bhtd" else (b, t, h, d)
    x = testing.make(size, dtype, values, memory, device)
    angle = testing.make((b, t, half) if by_sample else (t, half), torch.float64, seed=1) * 3
    kind = table_dtype or dtype
    return [
        x,
        *(testing.lay_out(f(angle).to(device, kind), memory) for f in (torch.cos, torch.sin)),
    ]


def _of_x(function, cos, sin, **options):
    """The function of x alone: tables have no gradient from the kernel."""

    def call(x):
        wide = x.dtype == torch.float64
        return function(x, *(t.double() if wide else t for t in (cos, sin)), **options)

    return call


def _kernel(*tensors, **options):
    return U.apply_rotary(*tensors, **options, implementation="kernel")


def _compare(inputs, gradients=True, **options):
    x, cos, sin = inputs
    return testing.compare(
        _of_x(_kernel, cos, sin, **options),
        _of_x(reference.apply_rotary, cos, sin, **options),
        [],
        [x],
        gradients=gradients,
    )


@pytest.mark.parametrize(("interleaved", "layout"), CONVENTIONS)
def test_values_and_gradients(every_backend, dtype, interleaved, layout):
    for shape in SMALL if every_backend.small else SHAPES:
        inputs = _inputs(shape, dtype, every_backend.device, layout=layout)
        y = _compare(inputs, interleaved=interleaved, layout=layout).outputs[0]
        assert y.is_contiguous() and y.dtype == dtype
        rest = 2 * shape[-1]
        assert torch.equal(y[..., rest:], inputs[0][..., rest:])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_types_of_the_tables(backend, dtype, interleaved):
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        shape = (2, 3, 5, 24, 9) if backend.small else (2, 3, 40, 70, 33)
        if backend.small and kind == torch.bfloat16:
            continue  # the interpreter's own arithmetic in bfloat16 is wrong
        inputs = _inputs(shape, dtype, backend.device, table_dtype=kind, by_sample=True)
        _compare(inputs, interleaved=interleaved)
        x, cos, sin = inputs
        _compare([x, cos.float(), sin], interleaved=interleaved)


@pytest.mark.parametrize("memory", testing.LAYOUTS)
@pytest.mark.parametrize(("interleaved", "layout"), CONVENTIONS)
def test_layouts(backend, dtype, memory, interleaved, layout):
    shape = (2, 3, 5, 10, 4) if backend.small else (2, 3, 37, 70, 33)
    for by_sample in (False, True):
        inputs = _inputs(
            shape, dtype, backend.device, layout=layout, memory=memory, by_sample=by_sample
        )
        _compare(inputs, interleaved=interleaved, layout=layout)


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    for interleaved in (False, True):
        inputs = _inputs((2, 2, 5, 40, 17), dtype, backend.device, values=values)
        if (backend.name, dtype, values) == ("cpu-avx512_bf16", torch.bfloat16, "denormal"):
            # This processor's conversion takes them as zeros, as the page on attention says.
            assert not _kernel(*inputs, interleaved=interleaved)[..., :34].any()
            continue
        _compare(inputs, interleaved=interleaved, gradients=values != "nonfinite")


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_products_depend_on_the_distance_alone(interleaved):
    q, k = (testing.make((1, 1, 1, 16), torch.float64, seed=seed) for seed in (0, 2))
    speed = 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8)

    def product(i, j, dtype):
        turned = []
        for x, position in ((q, i), (k, j)):
            tables = ((speed * position).cos(), (speed * position).sin())
            tables = (table[None].to(dtype) for table in tables)
            turned.append(_kernel(x.to(dtype), *tables, interleaved=interleaved))
        return (turned[0] * turned[1]).sum()

    for i, j in ((0, 3), (20, 23), (500, 503)):
        testing.check(product(i, j, torch.float32), product(7, 10, torch.float64), [], reduction=16)


def test_conventions_are_permutations_of_each_other(backend):
    x, cos, sin = _inputs((2, 3, 5, 12, 5), device=backend.device)
    order = torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4, 9, 10, 11], device=backend.device)
    halves = _kernel(x, cos, sin)
    assert torch.equal(_kernel(x[..., order], cos, sin, interleaved=True), halves[..., order])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_in_place_on_slices_of_a_fused_tensor(backend, dtype, interleaved):
    b, t, h, d, half = (2, 5, 2, 10, 4) if backend.small else (2, 33, 4, 40, 19)
    qkv = testing.make((b, t, 3, h, d), dtype, device=backend.device)
    before, version = qkv.clone(), qkv._version
    cos, sin = _inputs((b, h, t, d, half), dtype, backend.device)[1:]
    options = dict(interleaved=interleaved, layout="bthd")
    for i in range(2):
        x = qkv[:, :, i]
        assert _kernel(x, cos, sin, inplace=True, **options) is x
        assert torch.equal(x, _kernel(before[:, :, i], cos, sin, **options))
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])
    assert qkv._version > version, "autograd sees the change"


@pytest.mark.parametrize("memory", [m for m in testing.LAYOUTS if m != "expanded"])
def test_in_place_writes_nothing_else(backend, memory):
    x, cos, sin = _inputs((2, 3, 5, 10, 4), device=backend.device, memory=memory)
    expected, base = _kernel(x, cos, sin), x._base if x._base is not None else x
    outside = base.isnan()
    _kernel(x, cos, sin, inplace=True)
    assert torch.equal(x, expected)
    assert torch.equal(base.isnan(), outside)


def test_in_place_refuses_what_it_cannot_do():
    x, cos, sin = _inputs((2, 3, 5, 10, 4))
    leaf = x.clone().requires_grad_()
    with pytest.raises(udlkernels.ArgumentError, match="inplace: expected False where a gradient"):
        U.apply_rotary(leaf, cos, sin, inplace=True)
    with pytest.raises(udlkernels.ArgumentError, match="inplace: expected False where a gradient"):
        U.apply_rotary(x, cos, sin.requires_grad_(), inplace=True)
    with pytest.raises(udlkernels.ArgumentError, match="share no memory"):
        U.apply_rotary(x[:1].expand_as(x), cos, sin.detach(), inplace=True)
    with torch.no_grad():
        expected = U.apply_rotary(leaf, cos, sin)
        assert torch.equal(U.apply_rotary(leaf, cos, sin, inplace=True), expected)
        assert torch.equal(leaf, expected)


def test_in_place_by_the_formula():
    x, cos, sin = _inputs((2, 3, 5, 10, 4))
    expected = reference.apply_rotary(x, cos, sin)
    assert U.apply_rotary(x, cos, sin, inplace=True, implementation="reference") is x
    assert torch.equal(x, expected)


def test_tables_have_gradients_through_the_formula():
    x, cos, sin = (t.requires_grad_() for t in _inputs((2, 3, 5, 10, 4), torch.float64))
    (choice,) = udlkernels.explain(U.apply_rotary, x, cos, sin).choices
    assert choice.implementation == "reference" and "cos or sin" in str(choice)
    assert torch.autograd.gradcheck(U.apply_rotary, (x, cos, sin))
    with pytest.raises(udlkernels.ArgumentError, match="cos or sin needs a gradient"):
        _kernel(x, cos, sin)


@pytest.mark.parametrize(("interleaved", "layout"), CONVENTIONS)
def test_gradcheck_on_the_kernel(interleaved, layout):
    x, cos, sin = _inputs((2, 2, 3, 7, 3), torch.float64, layout=layout)
    function = _of_x(_kernel, cos, sin, interleaved=interleaved, layout=layout)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    assert torch.autograd.gradcheck(lambda t: function(t.mT.contiguous().mT).sin(), x)


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    sets = [_inputs((2, 3, n, 12, 4), layout="bthd") for n in (5, 8)]

    def function(x, cos, sin):
        return _kernel(x, cos.detach(), sin.detach(), layout="bthd")

    assert_compiles(function, sets, OPS, name, shapes == "dynamic")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_place(compiler):
    x, cos, sin = _inputs((2, 3, 5, 12, 5))

    def function(x, cos, sin):
        y = x * 2
        _kernel(y[:, 1:], cos, sin, inplace=True)
        return y + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    assert torch.equal(compiled(x, cos, sin), function(x, cos, sin))


def test_opcheck():
    op = torch.ops.udlkernels
    for memory in ("contiguous", "sliced", "expanded"):
        for interleaved, layout in CONVENTIONS:
            tensors = _inputs((2, 3, 5, 12, 5), layout=layout, memory=memory, by_sample=True)
            tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
            flags = interleaved, not interleaved, layout == "bthd"
            assert_opcheck(op.apply_rotary, (*tensors, *flags))
            if memory != "expanded":
                assert_opcheck(op.apply_rotary_, (*tensors, *flags))


@pytest.mark.parametrize(("interleaved", "layout"), CONVENTIONS)
def test_same_bits_at_any_thread_count(dtype_any, interleaved, layout):
    for shape in ((3, 8, 100, 64, 32), (1, 2, 700, 70, 33)):
        x, cos, sin = _inputs(shape, dtype_any, layout=layout)
        function = _of_x(_kernel, cos, sin, interleaved=interleaved, layout=layout)
        assert_deterministic(function, [x])


def test_samples_do_not_depend_on_each_other(backend, dtype):
    shape = (5, 2, 5, 10, 4) if backend.small else (7, 3, 40, 70, 33)
    x, cos, sin = _inputs(shape, dtype, backend.device)
    assert_rows_independent(_of_x(_kernel, cos, sin), [x])


def test_transforms_take_the_formula():
    x, cos, sin = _inputs((4, 3, 5, 10, 4))
    function = functools.partial(U.apply_rotary, cos=cos, sin=sin)
    by_sample = torch.func.vmap(lambda t: function(t[None])[0])(x)
    testing.check(by_sample, function(x.double()), [function(x)])
    _, tangent = torch.func.jvp(function, (x,), (x,))
    testing.check(tangent, function(x.double()), [function(x)])


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)], ids=str)
def test_empty(shape):
    x = torch.ones(shape, requires_grad=True)
    table = torch.ones(shape[2], 4)
    y = U.apply_rotary(x, table, table)
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 5, 8)), r"x: expected floating point, 4 dimensions \[B, H, T, D\]"),
        (dict(x=torch.ones(2, 3, 5, 8).int()), "x: expected floating point"),
        (
            dict(cos=torch.ones(6, 4)),
            r"cos: expected floating point, shape \[5, R / 2\] or \[2, 5,",
        ),
        (dict(cos=torch.ones(3, 5, 4)), "cos: expected floating point, shape"),
        (dict(cos=torch.ones(5)), "cos: expected floating point, shape"),
        (dict(sin=torch.ones(5, 4).int()), "sin: expected floating point, shape"),
        (dict(sin=torch.ones(5, 3)), r"sin: expected shape \[5, 4\] \(cos's\), got \[5, 3\]"),
        (dict(sin=torch.ones(2, 5, 4)), r"sin: expected shape \[5, 4\]"),
        (dict(cos=torch.ones(5, 8)), r"cos: expected a last dimension of R / 2, .* hint: of a"),
        (dict(cos=torch.ones(5, 0)), "cos: expected a last dimension of R / 2, with 0 < R <= 8"),
        (dict(sin=torch.ones(5, 4, device="meta")), "sin: expected a tensor on cpu"),
        (dict(layout="bthd"), r"cos: expected floating point, shape \[3, R / 2\]"),
        (dict(layout="tbhd"), "layout: expected 'bhtd' or 'bthd', got 'tbhd'"),
        (dict(implementation="torch"), "PyTorch has no such op"),
        (dict(implementation="fast"), "implementation: expected one of"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input(change, message):
    tensors = dict(x=torch.ones(2, 3, 5, 8), cos=torch.ones(5, 4), sin=torch.ones(5, 4))
    with pytest.raises(udlkernels.ArgumentError, match=message) as error:
        U.apply_rotary(**(tensors | change))
    assert str(error.value).startswith("[apply_rotary] ")


def test_tables_in_the_usual_form_of_a_model():
    """Rotation by position 1 with a single speed of pi / 2: (a, b) becomes (-b, a)."""
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0, 5.0]]]])
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    assert _kernel(x, cos, sin).tolist() == [[[[-3.0, -4.0, 1.0, 2.0, 5.0]]]]
    assert _kernel(x, cos, sin, interleaved=True).tolist() == [[[[-2.0, 1.0, -4.0, 3.0, 5.0]]]]
    assert math.isnan(_kernel(x, cos * math.nan, sin)[0, 0, 0, 0])
