"""merge_lse: values, gradients, parts without keys, its use, layouts, compilation, errors."""

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
from udlkernels.attention.merge_lse import reference

# B, H, T, D
SHAPES = [(2, 3, 5, 8), (1, 2, 33, 64), (3, 1, 7, 65), (1, 1, 200, 1), (2, 4, 3, 300)]
SMALL = [(2, 3, 5, 8), (1, 2, 20, 13)]
OPS = "merge_lse_fwd", "merge_lse_bwd"


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inputs(shape, dtype=torch.float32, device="cpu", *, layout="bhtd", memory="contiguous",
            values="normal"):  # fmt: skip
    b, h, t, d = shape
    size = (b, t, h, d) if layout == "bthd" else shape
    found = []
    for seed in (0, 2):
        found.append(testing.make(size, dtype, values, memory, device, seed))
        lse = testing.make((b, h, t), _wide(dtype), seed=seed + 1) * 4 + 3
        found.append(testing.lay_out(lse.to(device), memory))
    return found


def _kernel(*tensors, **options):
    return U.merge_lse(*tensors, **options, implementation="kernel")


def _compare(inputs, gradients=True, **options):
    return testing.compare(
        functools.partial(_kernel, **options),
        functools.partial(reference.merge_lse, **options),
        [],
        inputs,
        gradients=gradients,
        reduction=inputs[0].shape[-1],
    )


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_values_and_gradients(every_backend, dtype, layout):
    for shape in SMALL if every_backend.small else SHAPES:
        inputs = _inputs(shape, dtype, every_backend.device, layout=layout)
        out, lse = _compare(inputs, layout=layout).outputs
        assert out.is_contiguous() and out.dtype == dtype
        assert lse.is_contiguous() and lse.dtype == _wide(dtype)


@pytest.mark.parametrize("memory", testing.LAYOUTS)
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_layouts(backend, dtype, memory, layout):
    shape = (2, 3, 5, 10) if backend.small else (2, 3, 21, 70)
    _compare(_inputs(shape, dtype, backend.device, layout=layout, memory=memory), layout=layout)


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    inputs = _inputs((2, 2, 5, 40), dtype, backend.device, values=values)
    if (backend.name, dtype, values) == ("cpu-avx512_bf16", torch.bfloat16, "denormal"):
        # This processor's conversion takes them as zeros, as the page on attention says.
        assert not _kernel(*inputs)[0].any()
        return
    # Elsewhere the gradients to the logarithms are differences of equal numbers, or not finite.
    _compare(inputs, gradients=values in ("normal", "denormal"))


@pytest.mark.parametrize("size", [(5, 8), (3, 5, 8), (2, 1, 3, 2, 5, 8)], ids=str)
def test_any_leading_dimensions(backend, size):
    tensors = [testing.make(size, device=backend.device, seed=seed) for seed in range(2)]
    lses = [testing.make(size[:-1], device=backend.device, seed=seed) for seed in range(2, 4)]
    out, lse = _compare([tensors[0], lses[0], tensors[1], lses[1]]).outputs
    assert out.shape == size and lse.shape == size[:-1]


def _with_empty_parts(dtype, device):
    """Row t sees: both parts, a alone, b alone, none. What is not seen is NaN."""
    out_a, lse_a, out_b, lse_b = _inputs((2, 3, 4, 9), dtype, device)
    lse_a[:, :, 2:] = -math.inf
    out_a[:, :, 2:] = math.nan
    lse_b[:, :, [1, 3]] = -math.inf
    out_b[:, :, [1, 3]] = math.nan
    return [out_a, lse_a, out_b, lse_b]


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_parts_without_keys_give_nothing(backend, dtype, layout):
    tensors = _with_empty_parts(dtype, backend.device)
    out_a, lse_a, out_b, lse_b = tensors
    if layout == "bthd":
        tensors = [out_a.transpose(1, 2), lse_a, out_b.transpose(1, 2), lse_b]
    found = _compare(tensors, layout=layout)
    out, lse = found.outputs
    out = out.transpose(1, 2) if layout == "bthd" else out
    assert torch.equal(out[:, :, 1], out_a[:, :, 1]) and torch.equal(lse[:, :, 1], lse_a[:, :, 1])
    assert torch.equal(out[:, :, 2], out_b[:, :, 2]) and torch.equal(lse[:, :, 2], lse_b[:, :, 2])
    assert not out[:, :, 3].any() and (lse[:, :, 3] == -math.inf).all()
    assert all(g.isfinite().all() for g in found.gradients)
    for place, gradient in zip((2, 2, 1, 1), found.gradients, strict=True):
        if gradient.dim() == 4 and layout == "bthd":
            gradient = gradient.transpose(1, 2)
        assert not gradient[:, :, [place, 3]].any() and gradient[:, :, 0].any()


def test_no_gradient_reaches_a_part_without_keys(backend):
    """Not even one that is NaN."""
    tensors = [t.requires_grad_() for t in _with_empty_parts(torch.float32, backend.device)]
    out, lse = _kernel(*tensors)
    nan = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
    gradients = torch.autograd.grad((out, lse), tensors, nan)
    for place, gradient in zip((2, 2, 1, 1), gradients, strict=True):
        assert not gradient[:, :, [place, 3]].any() and gradient[:, :, 0].isnan().all()


def test_logarithms_of_any_size(backend, dtype):
    inputs = _inputs((1, 2, 6, 9), dtype, backend.device)
    for shift in (-1e4, 1e4):
        moved = [inputs[0], inputs[1] + shift, inputs[2], inputs[3] + shift]
        testing.check(_kernel(*moved)[0], reference.merge_lse(*(t.double() for t in moved))[0], [])
    far = [inputs[0], inputs[1] + 500, inputs[2], inputs[3] - 500]
    out, lse = _kernel(*far)
    assert torch.equal(out, inputs[0]) and torch.equal(lse, far[1])
    nan = _kernel(inputs[0], inputs[1] * math.nan, *inputs[2:])
    assert nan[0].isnan().all() and nan[1].isnan().all()


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_halves_of_the_keys_make_attention_over_all(backend, dtype, layout):
    b, h, t, s, d = (1, 2, 5, 9, 8) if backend.small else (2, 3, 21, 70, 32)
    q, k, v = (
        testing.make((b, h, n, d), dtype, device=backend.device, seed=seed)
        for seed, n in enumerate((t, s, s))
    )
    mask = torch.rand(t, s, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0], mask[1, : s // 2], mask[2, s // 2 :] = False, False, False
    mask = mask.to(backend.device)
    if layout == "bthd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    keys = 1 if layout == "bthd" else 2

    def attend(q, k, v, mask, implementation):
        return U.attention(
            q, k, v, mask=mask, layout=layout, return_lse=True, implementation=implementation
        )

    def merged(q, k, v):
        parts = [x.tensor_split([s // 2], dim) for x, dim in ((k, keys), (v, keys), (mask, 1))]
        a, b = (attend(q, *part, "auto") for part in zip(*parts, strict=True))
        return _kernel(*a, *b, layout=layout)

    testing.compare(
        merged,
        lambda q, k, v: attend(q, k, v, mask, "reference"),
        [lambda q, k, v: attend(q, k, v, mask, "auto")],
        [q, k, v],
        reduction=s + 2 * d,
    )


def test_gradcheck_on_the_kernel():
    for layout in ("bhtd", "bthd"):
        function = functools.partial(_kernel, layout=layout)
        tensors = [t.requires_grad_() for t in _inputs((1, 2, 3, 4), torch.float64, layout=layout)]
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


def test_second_gradients_of_parts_without_keys_are_finite():
    tensors = [t.requires_grad_() for t in _with_empty_parts(torch.float64, "cpu")]
    out, lse = _kernel(*tensors)
    loss = out.square().sum() + lse[:, :, :3].square().sum()
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
    assert all(g.isfinite().all() for g in (*first, *second))


def test_gradients_only_where_wanted(backend):
    tensors = _inputs((2, 3, 5, 8), device=backend.device)
    whole = testing.run(_kernel, tensors)
    cotangents = testing.make_cotangents(whole.outputs)
    for i in range(4):
        some = [t.detach().requires_grad_(i == n) for n, t in enumerate(tensors)]
        (found,) = torch.autograd.grad(_kernel(*some), some[i], cotangents)
        assert torch.equal(found, whole.gradients[i])


@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_one_result_alone_has_a_gradient(backend, dtype, which):
    def one(function):
        return lambda *tensors: function(*tensors)[which]

    inputs = _inputs((2, 3, 5, 8), dtype, backend.device)
    testing.compare(one(_kernel), one(reference.merge_lse), [], inputs, reduction=8)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler, layout):
    name, shapes = compiler.split("-")
    sets = [_inputs((2, 3, n, 12), layout=layout) for n in (5, 8)]
    function = functools.partial(_kernel, layout=layout)
    assert_compiles(function, sets, OPS, name, shapes == "dynamic")


def test_opcheck():
    op = torch.ops.udlkernels
    for memory in ("contiguous", "sliced", "expanded"):
        for heads_last in (False, True):
            tensors = _inputs((2, 3, 5, 12), memory=memory)
            out, lse = op.merge_lse_fwd(*tensors, heads_last)
            assert_opcheck(op.merge_lse_fwd, (*tensors, heads_last))
            for dlse, wanted in ((lse, (True, True)), (None, (True, False)), (lse, (False, True))):
                assert_opcheck(op.merge_lse_bwd, (out, dlse, *tensors, heads_last, *wanted))


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_same_bits_at_any_thread_count(dtype_any, layout):
    function = functools.partial(_kernel, layout=layout)
    assert_deterministic(function, _inputs((3, 5, 90, 70), dtype_any, layout=layout))


def test_samples_do_not_depend_on_each_other(backend, dtype):
    shape = (5, 2, 4, 9) if backend.small else (7, 3, 20, 70)
    assert_rows_independent(_kernel, _inputs(shape, dtype, backend.device), (0, 1, 2, 3))


def test_transforms_take_the_formula():
    tensors = _inputs((3, 2, 5, 8))
    exact = reference.merge_lse(*(t.double() for t in tensors))
    found = torch.func.vmap(U.merge_lse)(*tensors)
    for ours, truth, kernel in zip(found, exact, _kernel(*tensors), strict=True):
        testing.check(ours, truth, [kernel])
    _, tangent = torch.func.jvp(U.merge_lse, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    testing.check(tangent[1], torch.ones_like(exact[1]), [])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty(shape):
    tensors = [t.requires_grad_() for t in _inputs(shape)]
    out, lse = U.merge_lse(*tensors)
    assert out.shape == shape and lse.shape == shape[:3]
    gradients = torch.autograd.grad(out.sum() + lse.sum(), tensors)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out_a=torch.ones(4)), r"out_a: expected floating point, shape \[..., T, D\]"),
        (dict(out_a=torch.ones(2, 3, 5, 8).int()), "out_a: expected floating point"),
        (
            dict(out_b=torch.ones(2, 3, 5, 7)),
            r"out_b: expected torch.float32, shape \[2, 3, 5, 8\]",
        ),
        (dict(out_b=torch.ones(2, 3, 5, 8).half()), "out_b: expected torch.float32"),
        (dict(lse_a=torch.ones(2, 5, 3)), r"lse_a: expected torch.float32, shape \[2, 3, 5\]"),
        (dict(lse_b=torch.ones(2, 3, 5).double()), "lse_b: expected torch.float32, shape"),
        (dict(lse_b=torch.ones(2, 3, 5, device="meta")), "lse_b: expected a tensor on cpu"),
        (dict(layout="bthd"), r"lse_a: expected torch.float32, shape \[2, 5, 3\]"),
        (dict(layout="thd"), "layout: expected 'bhtd' or 'bthd', got 'thd'"),
        (dict(implementation="torch"), "PyTorch has no such op"),
        (dict(implementation="fast"), "implementation: expected one of"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input(change, message):
    outs = dict(out_a=torch.ones(2, 3, 5, 8), out_b=torch.ones(2, 3, 5, 8))
    lses = dict(lse_a=torch.ones(2, 3, 5), lse_b=torch.ones(2, 3, 5))
    with pytest.raises(udlkernels.ArgumentError, match=message) as error:
        U.merge_lse(**(outs | lses | change))
    assert str(error.value).startswith("[merge_lse] ")


def test_bthd_needs_four_dimensions():
    with pytest.raises(udlkernels.ArgumentError, match=r"out_a: expected .* \[B, T, H, D\]"):
        U.merge_lse(torch.ones(3, 8), torch.ones(3), torch.ones(3, 8), torch.ones(3), layout="bthd")
