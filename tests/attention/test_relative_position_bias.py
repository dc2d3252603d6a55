"""relative_position_bias and its indices: values, gradients, bounds, compilation, errors."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import udlkernels
from tests.support import assert_compiles, assert_deterministic, assert_opcheck
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.attention import swin_index, t5_index
from udlkernels.attention.relative_position_bias import reference

# n, H, T, S
SHAPES = [(7, 3, 5, 6), (169, 24, 49, 49), (32, 12, 60, 81), (1, 1, 1, 1), (40, 17, 9, 300)]
SMALL = [(7, 3, 5, 6), (40, 2, 9, 11), (300, 2, 20, 13)]
OPS = "relative_position_bias_fwd", "relative_position_bias_bwd"


def _index(n, t, s, kind=torch.int64, device="cpu"):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(n, (t, s), generator=generator).to(device, kind)


def _kernel(table, index):
    return U.relative_position_bias(table, index, implementation="kernel")


def _compare(table, index, gradients=True):
    return testing.compare(
        lambda t: _kernel(t, index),
        lambda t: reference.relative_position_bias(t, index),
        [],
        [table],
        gradients=gradients,
    )


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_values_and_gradients(every_backend, dtype, kind):
    device = every_backend.device
    for n, h, t, s in SMALL if every_backend.small else SHAPES:
        table = testing.make((n, h), dtype, device=device)
        index = _index(n, t, s, kind, device)
        out = _compare(table, index).outputs[0]
        assert out.is_contiguous() and out.dtype == dtype
        assert torch.equal(out, table[index.long()].permute(2, 0, 1)), "nothing is rounded"


def test_usual_tables(backend, dtype):
    cases = [(9, swin_index(2, 2)), (8, t5_index(7, 9, num_buckets=8, max_distance=6))]
    if not backend.small:
        cases = [(169, swin_index(7, 7)), (23 * 15, swin_index(12, 8)), (32, t5_index(200, 230))]
    for n, index in cases:
        table = testing.make((n, 6), dtype, device=backend.device)
        _compare(table, index.to(backend.device))


def test_many_rows_take_long_chunks():
    """Sums of 1089 rows go over chunks of 8712 positions; with few rows over 2048."""
    index = swin_index(17, 17)
    _compare(testing.make((33 * 33, 4)), index)
    _compare(testing.make((5, 4)), index % 5)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    table = testing.make((40, 6), dtype, layout=layout, device=backend.device)
    index = _index(40, 9, 11, device=backend.device)
    _compare(table, index)
    _compare(table, index.T.contiguous().T)
    _compare(table, index[:1].expand(4, 11))
    _compare(table, index[:, ::3])


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    table = testing.make((40, 6), dtype, values, device=backend.device)
    index = _index(40, 9, 11, device=backend.device)
    out = _compare(table, index, gradients=values != "nonfinite").outputs[0]
    expected = table[index].permute(2, 0, 1)
    assert torch.equal(out.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_nan_in_a_gradient_reaches_its_row_alone(backend, dtype):
    table = testing.make((6, 2), dtype, device=backend.device).requires_grad_()
    index = _index(5, 4, 6, device=backend.device)  # row 5 stands nowhere
    out = _kernel(table, index)
    dout = torch.ones_like(out)
    dout[1, 2, 3] = torch.nan
    (found,) = torch.autograd.grad(out, table, dout)
    expected = torch.zeros(6, 2, dtype=torch.bool, device=backend.device)
    expected[index[2, 3], 1] = True
    assert torch.equal(found.isnan(), expected)
    assert not found[5].any()


def test_gradients_of_any_strides(backend):
    table = testing.make((40, 6), device=backend.device).requires_grad_()
    index = _index(40, 9, 11, device=backend.device)
    dout = testing.make((6, 9, 11), device=backend.device, seed=3)
    (expected,) = torch.autograd.grad(_kernel(table, index), table, dout)
    for layout in ("sliced", "transposed"):
        (found,) = torch.autograd.grad(_kernel(table, index), table, testing.lay_out(dout, layout))
        assert torch.equal(found, expected)
    (found,) = torch.autograd.grad(_kernel(table, index).sum(), table)
    counts = torch.bincount(index.flatten().cpu(), minlength=40).to(backend.device)
    assert torch.equal(found, counts[:, None].expand(40, 6).float())


def test_gradcheck_on_the_kernel():
    table = testing.make((6, 2), torch.float64).requires_grad_()
    index = _index(6, 4, 3)
    assert torch.autograd.gradcheck(_kernel, (table, index))
    assert torch.autograd.gradgradcheck(_kernel, (table, index))
    assert torch.autograd.gradgradcheck(lambda t: _kernel(t, index).sin(), table)


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    sets = [[testing.make((40, 6)), _index(40, t, t + 3)] for t in (5, 8)]
    assert_compiles(_kernel, sets, OPS, name, shapes == "dynamic")


def test_opcheck():
    op = torch.ops.udlkernels
    for kind in (torch.int32, torch.int64):
        table, index = testing.make((40, 6)), _index(40, 5, 8, kind)
        out = op.relative_position_bias_fwd(table, index)
        assert_opcheck(op.relative_position_bias_fwd, (table, index))
        assert_opcheck(op.relative_position_bias_bwd, (out, index, 40))


def test_same_bits_at_any_thread_count(dtype_any):
    for n, index in ((32, t5_index(150, 170)), (169, swin_index(7, 7))):
        table = testing.make((n, 12), dtype_any)
        assert_deterministic(lambda t, index=index: _kernel(t, index), [table])


def test_heads_do_not_depend_on_each_other(backend, dtype):
    table = testing.make((40, 21), dtype, device=backend.device).requires_grad_()
    index = _index(40, 9, 11, device=backend.device)
    dout = testing.make((21, 9, 11), dtype, device=backend.device, seed=3)
    out = _kernel(table, index)
    (whole,) = torch.autograd.grad(out, table, dout)
    for heads in (slice(0, 1), slice(4, 21)):
        part = _kernel(table[:, heads], index)
        assert torch.equal(part, out[heads])
        (found,) = torch.autograd.grad(part, table, dout[heads])
        assert torch.equal(found[:, heads], whole[:, heads])


def test_transforms_take_the_formula():
    tables = testing.make((3, 40, 6))
    index = _index(40, 5, 8)
    found = torch.func.vmap(lambda t: U.relative_position_bias(t, index))(tables)
    assert torch.equal(found[1], _kernel(tables[1], index))
    _, tangent = torch.func.jvp(
        lambda t: U.relative_position_bias(t, index), (tables[0],), (tables[1],)
    )
    assert torch.equal(tangent, _kernel(tables[1], index))


def test_as_the_bias_of_attention(backend):
    n, heads, index = 9, 2, swin_index(2, 2).to(backend.device)
    table = testing.make((n, heads), device=backend.device)
    q, k, v = (testing.make((3, heads, 4, 8), device=backend.device, seed=s) for s in (1, 2, 3))

    def attend(function, implementation):
        return lambda q, k, v, table: U.attention(
            q, k, v, bias=function(table, index), implementation=implementation
        )

    formula = attend(reference.relative_position_bias, "reference")
    testing.compare(
        attend(_kernel, "kernel"), formula, [formula], [q, k, v, table], reduction=3 * 4 * 4
    )


@pytest.mark.parametrize("value", [-1, 7, 2**40], ids=str)
@pytest.mark.parametrize("place", [0, 29, 2500])
@pytest.mark.parametrize("implementation", ["auto", "kernel", "reference"])
def test_index_outside_of_the_table(value, place, implementation):
    table, index = torch.ones(7, 3), torch.zeros(50, 60, dtype=torch.int64)
    index.view(-1)[place] = value
    with pytest.raises(udlkernels.ArgumentError, match="index: expected values from 0 to 6"):
        U.relative_position_bias(table, index, implementation=implementation)
    if value < 2**31:
        with pytest.raises(udlkernels.ArgumentError, match="index: expected values from 0 to 6"):
            U.relative_position_bias(table, index.int(), implementation=implementation)


def test_compiled_index_outside_of_the_table():
    torch._dynamo.reset()
    compiled = torch.compile(U.relative_position_bias, fullgraph=True, backend="aot_eager")
    table, index = torch.ones(7, 3), torch.full((2, 3), 7)
    with pytest.raises(RuntimeError):
        compiled(table, index)
    with pytest.raises(RuntimeError):
        torch.ops.udlkernels.relative_position_bias_bwd(torch.ones(3, 2, 3), index, 7)


def test_index_outside_of_the_table_on_a_gpu(backend):
    """It is NaN, and its gradient nobody's; the interpreter shows the same."""
    if backend.name.startswith("cpu"):
        pytest.skip("the CPU kernel raises instead; the test above asserts it")
    from udlkernels.attention.relative_position_bias import kernels

    table = torch.arange(14.0, device=backend.device).reshape(7, 2)
    index = torch.tensor([[0, -1, 6], [7, 2**40, 3]], device=backend.device)
    out = kernels.relative_position_bias_fwd(table, index)
    inside = torch.tensor([[True, False, True], [False, False, True]], device=backend.device)
    assert torch.equal(out.isnan(), ~inside.expand(2, 2, 3))
    assert out[1][inside].tolist() == [1.0, 13.0, 7.0]
    found = kernels.relative_position_bias_bwd(torch.ones_like(out), index, 7)
    assert found.tolist() == [[float(r in (0, 3, 6))] * 2 for r in range(7)]


@pytest.mark.parametrize(
    ("n", "h", "t", "s"), [(3, 0, 2, 2), (3, 2, 0, 2), (3, 2, 2, 0), (0, 2, 0, 0)]
)
def test_empty(n, h, t, s):
    table = torch.ones(n, h, requires_grad=True)
    out = U.relative_position_bias(table, torch.zeros(t, s, dtype=torch.int64))
    assert out.shape == (h, t, s)
    (found,) = torch.autograd.grad(out.sum(), table)
    assert found.shape == (n, h) and not found.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(table=torch.ones(7)), r"table: expected floating point, shape \[n, H\]"),
        (dict(table=torch.ones(7, 3).int()), "table: expected floating point"),
        (dict(index=torch.zeros(4, dtype=torch.int64)), r"index: expected int32 or int64, shape"),
        (dict(index=torch.zeros(4, 5)), "index: expected int32 or int64"),
        (dict(index=torch.zeros(4, 5, dtype=torch.uint8)), "index: expected int32 or int64"),
        (dict(index=torch.zeros(4, 5, dtype=torch.int32, device="meta")), "a tensor on cpu"),
        (dict(implementation="torch"), "PyTorch has no such op"),
        (dict(implementation="fast"), "implementation: expected one of"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input(change, message):
    tensors = dict(table=torch.ones(7, 3), index=torch.zeros(4, 5, dtype=torch.int32))
    with pytest.raises(udlkernels.ArgumentError, match=message) as error:
        U.relative_position_bias(**(tensors | change))
    assert str(error.value).startswith("[relative_position_bias] ")


@pytest.mark.parametrize(("height", "width"), [(7, 7), (1, 1), (3, 5), (4, 1)])
def test_swin_index(height, width):
    places = [(y, x) for y in range(height) for x in range(width)]
    pairs = {}
    found = swin_index(height, width)
    assert found.shape == (height * width, height * width) and found.dtype == torch.int64
    for i, (y, x) in enumerate(places):
        for j, (other_y, other_x) in enumerate(places):
            down, right = y - other_y + height - 1, x - other_x + width - 1
            assert found[i, j] == down * (2 * width - 1) + right
            pairs.setdefault((down, right), set()).add(int(found[i, j]))
    rows = (2 * height - 1) * (2 * width - 1)
    assert sorted(row for rows in pairs.values() for row in rows) == list(range(rows))


def _bucket(ahead, bidirectional, buckets, furthest):
    """In exact arithmetic: the k-th wider bucket starts where (d / exact)^wider reaches
    (furthest / exact)^k."""
    base = 0
    if bidirectional:
        buckets //= 2
        base = buckets if ahead > 0 else 0
    distance = abs(ahead) if bidirectional else max(-ahead, 0)
    exact = buckets // 2
    if distance < exact:
        return base + distance
    wider = buckets - exact
    power, k = Fraction(distance, exact) ** wider, 0
    while k + 1 < wider and power >= Fraction(furthest, exact) ** (k + 1):
        k += 1
    return base + exact + k


@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (64, 100)])
def test_t5_index(bidirectional, buckets, furthest):
    options = dict(bidirectional=bidirectional, num_buckets=buckets, max_distance=furthest)
    whole = t5_index(150, 170, **options)
    assert whole.shape == (150, 170) and whole.dtype == torch.int64
    expected = {d: _bucket(d, bidirectional, buckets, furthest) for d in range(-149, 170)}
    assert whole.tolist() == [[expected[j - i] for j in range(170)] for i in range(150)]
    assert whole.min() >= 0 and whole.max() < buckets


def test_bad_arguments_of_the_indices():
    for call, message in (
        (lambda: swin_index(0, 3), r"\[swin_index\] window_h: expected at least 1, got 0"),
        (lambda: swin_index(3, -1), r"\[swin_index\] window_w: expected at least 1, got -1"),
        (lambda: t5_index(-1, 3), r"\[t5_index\] T: expected at least 0"),
        (lambda: t5_index(3, 3, num_buckets=3), r"num_buckets: expected at least 4, got 3"),
        (lambda: t5_index(3, 3, max_distance=8), r"max_distance: expected more than 8, got 8"),
    ):
        with pytest.raises(udlkernels.ArgumentError, match=message):
            call()
    assert t5_index(0, 3).shape == (0, 3)
