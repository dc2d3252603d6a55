"""block_sparse_attention: values, gradients, masks, compilation, determinism, errors."""

from __future__ import annotations

import math

import pytest
import torch

import udlkernels
from tests.support import (
    assert_compiles,
    assert_deterministic,
    assert_rows_independent,
)
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.attention import patterns
from udlkernels.attention.block_sparse_attention import reference

# B, H, Hkv, T, S, D, Dv and the block size.
CASES = [
    ((1, 2, 1, 20, 33, 8, 8), 1),
    ((2, 4, 2, 70, 130, 16, 9), 16),
    ((1, 2, 2, 200, 145, 33, 32), 48),
    ((2, 2, 1, 200, 300, 64, 64), 64),
    ((1, 2, 1, 250, 330, 32, 16), 100),
    ((1, 2, 1, 300, 257, 128, 128), 128),
    ((1, 1, 1, 5, 7, 4, 4), 1000),
]
SMALL = [((1, 2, 1, 7, 9, 8, 5), 1), ((2, 2, 1, 20, 35, 8, 8), 16), ((1, 2, 2, 70, 80, 16, 16), 64)]


def _inputs(shape, dtype=torch.float32, device="cpu", layout="contiguous", values="normal"):
    b, h, hkv, t, s, d, dv = shape
    sizes = [(b, h, t, d), (b, hkv, s, d), (b, hkv, s, dv)]
    return [testing.make(x, dtype, values, layout, device, n) for n, x in enumerate(sizes)]


def _mask(shape, size, leading=None, device="cpu", share=0.5):
    """Random blocks; the first row of blocks sees nothing where there are more."""
    b, h, _, t, s, *_ = shape
    generator = torch.Generator().manual_seed(3)
    blocks = -(-t // size), -(-s // size)
    mask = torch.rand(*((b, h) if leading is None else leading), *blocks, generator=generator)
    mask = mask < share
    if blocks[0] > 1:
        mask[..., 0, :] = False
    return mask.to(device)


def _function(function, mask, size, **options):
    def call(q, k, v):
        return function(q, k, v, mask, block_size=size, **options)

    return call


def _kernel(q, k, v, mask, **options):
    return U.block_sparse_attention(q, k, v, mask, **options, implementation="kernel")


def _compare(inputs, mask, size, gradients=True, **options):
    formula = _function(reference.block_sparse_attention, mask, size, **options)
    terms = max(inputs[0].shape[2] * inputs[0].shape[1] // inputs[1].shape[1], inputs[1].shape[2])
    return testing.compare(
        _function(_kernel, mask, size, **options),
        formula,
        [formula],
        inputs,
        gradients=gradients,
        reduction=inputs[0].shape[3] + inputs[2].shape[3] + terms,
    )


def test_values_and_gradients(every_backend, dtype):
    for shape, size in SMALL if every_backend.small else CASES:
        inputs = _inputs(shape, dtype, every_backend.device)
        mask = _mask(shape, size, device=every_backend.device)
        _compare(inputs, mask, size, return_lse=True)


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_causal(backend, dtype, causal):
    for shape, size in SMALL[1:2] if backend.small else CASES[1:4]:
        inputs = _inputs(shape, dtype, backend.device)
        mask = _mask(shape, size, (), backend.device)
        _compare(inputs, mask, size, causal=causal, scale=-0.3)


@pytest.mark.parametrize("leading", [(), (1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_masks_broadcast(backend, leading):
    shape, size = ((2, 4, 2, 9, 17, 4, 4), 8) if backend.small else ((2, 4, 2, 70, 130, 8, 8), 32)
    inputs = _inputs(shape, device=backend.device)
    mask = _mask(shape, size, leading, backend.device)
    _compare(inputs, mask, size)
    _compare(inputs, mask.mT.contiguous().mT, size, gradients=False)
    spread = mask if mask.dim() == 4 else mask[None, None]
    expanded = spread.expand(2, 4, *mask.shape[-2:])
    one, other = (
        _kernel(*inputs, mask, block_size=size),
        _kernel(*inputs, expanded, block_size=size),
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, layout):
    shape, size = ((2, 2, 1, 9, 17, 4, 4), 8) if backend.small else ((2, 4, 2, 70, 130, 8, 8), 32)
    mask = _mask(shape, size, device=backend.device)
    _compare(_inputs(shape, device=backend.device, layout=layout), mask, size)


def test_the_formula_is_attention_with_a_mask():
    shape, size = CASES[1]
    inputs = _inputs(shape, torch.float64)
    mask = _mask(shape, size)
    wide = mask.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., : shape[3], : shape[4]]
    expected = U.attention(*inputs, mask=wide, implementation="reference")
    found = reference.block_sparse_attention(*inputs, mask, block_size=size)
    assert torch.equal(found, expected)


def test_blocks_that_nobody_sees_leave_no_trace(backend, dtype):
    """NaN or Inf in them is as zeros there, whatever tiles they share."""
    for shape, size in SMALL[1:] if backend.small else CASES[1:6]:
        q, k, v = _inputs(shape, dtype, backend.device)
        mask = _mask(shape, size, (), backend.device, share=0.7)
        hidden = -(-shape[4] // size) // 2
        mask[:, hidden] = False
        keys = slice(hidden * size, (hidden + 1) * size)
        results = []
        for filler in (0.0, math.nan, math.inf):
            k[:, :, keys], v[:, :, keys] = filler, filler
            call = _function(_kernel, mask, size, return_lse=True)
            results.append(testing.run(call, [q, k.clone(), v.clone()]))
        clean, *others = (found.outputs + found.gradients for found in results)
        for found in others:
            for ours, theirs in zip(found, clean, strict=True):
                testing.check(ours, theirs.double(), [], reduction=sum(shape[3:]))
        for gradient in clean[3:]:
            assert not gradient[:, :, keys].any()


def test_rows_that_see_nothing(backend, dtype):
    shape, size = SMALL[1] if backend.small else CASES[3]
    inputs = _inputs(shape, dtype, backend.device)
    mask = _mask(shape, size, device=backend.device)
    found = _compare(inputs, mask, size, return_lse=True)
    out, lse = found.outputs
    assert not out[:, :, :size].any() and (lse[:, :, :size] == -math.inf).all()
    assert not found.gradients[0][:, :, :size].any()
    none = _compare(inputs, torch.zeros_like(mask), size, return_lse=True)
    assert not none.outputs[0].any() and (none.outputs[1] == -math.inf).all()
    assert not any(gradient.any() for gradient in none.gradients)


def test_gradcheck_on_the_kernel():
    shape = (1, 2, 1, 5, 6, 3, 2)
    tensors = [t.requires_grad_() for t in _inputs(shape, torch.float64)]
    mask = _mask(shape, 2)
    mask[..., 0] = True  # the logarithm of an empty row has no difference quotient
    function = _function(_kernel, mask, 2, causal="bottom_right", return_lse=True)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_gradients_only_where_wanted(backend):
    shape, size = SMALL[1]
    tensors = _inputs(shape, device=backend.device)
    function = _function(_kernel, _mask(shape, size, device=backend.device), size)
    whole = testing.run(function, tensors).gradients
    for i in range(3):
        some = [t.detach().requires_grad_(i == n) for n, t in enumerate(tensors)]
        out = function(*some)
        (found,) = torch.autograd.grad(out, some[i], *testing.make_cotangents([out]))
        assert torch.equal(found, whole[i])


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")

    def call(q, k, v, mask):
        return _kernel(q, k, v, mask, block_size=4, causal="bottom_right", return_lse=True)

    sets = []
    for n in (17, 24):  # 5 by 7 blocks and 6 by 9: no two sizes of the first call are the same
        shape = (2, 4, 2, n, n + 9, 6, 8)
        sets.append([*_inputs(shape), _mask(shape, 4)])
    assert_compiles(call, sets, ("attention_fwd", "attention_bwd"), name, shapes == "dynamic")


def test_same_bits_at_any_thread_count(dtype_any):
    for shape, size in CASES[1:5]:
        function = _function(_kernel, _mask(shape, size), size, return_lse=True)
        assert_deterministic(function, _inputs(shape, dtype_any))


def test_samples_do_not_depend_on_each_other(backend, dtype):
    shape = (6, 2, 1, 20, 35, 4, 3) if backend.small else (7, 4, 2, 70, 90, 16, 24)
    function = _function(_kernel, _mask(shape, 16, (), backend.device), 16)
    assert_rows_independent(function, _inputs(shape, dtype, backend.device), (0, 1, 2))


def test_a_row_does_not_depend_on_other_blocks(backend, dtype):
    """Its bits stay what they are when other queries see more."""
    shape, size = SMALL[1] if backend.small else CASES[3]
    inputs = _inputs(shape, dtype, backend.device)
    mask = _mask(shape, size, (), backend.device)
    more = mask.clone()
    more[0] = True
    one, other = (_kernel(*inputs, m, block_size=size)[:, :, size:] for m in (mask, more))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 3, 4, 5, 6), (2, 2, 1, 0, 4, 5, 6), (2, 2, 1, 3, 0, 5, 6)]
)
def test_empty(shape):
    b, h, _, t, _, _, dv = shape
    tensors = [x.requires_grad_() for x in _inputs(shape)]
    out, lse = U.block_sparse_attention(
        *tensors, _mask(shape, 2), block_size=2, causal="top_left", return_lse=True
    )
    assert out.shape == (b, h, t, dv) and lse.shape == (b, h, t)
    gradients = torch.autograd.grad(out.sum() + lse.exp().sum(), tensors)
    assert [g.shape for g in gradients] == [x.shape for x in tensors]


def test_explained_and_transformed():
    shape, size = CASES[1]
    inputs, mask = _inputs(shape), _mask(*CASES[1], (), share=0.9)
    (choice,) = udlkernels.explain(U.block_sparse_attention, *inputs, mask, block_size=size).choices
    assert (choice.op, choice.implementation) == ("block_sparse_attention", "kernel")
    function = _function(U.block_sparse_attention, mask, size)
    by_sample = torch.func.vmap(lambda *t: function(*(x[None] for x in t))[0])(*inputs)
    exact = reference.block_sparse_attention(*(t.double() for t in inputs), mask, block_size=size)
    testing.check(by_sample, exact, [function(*inputs)])
    wide = [torch.randn(1, 1, 3, 513) for _ in range(3)]
    args = dict(block_mask=torch.ones(1, 1, dtype=torch.bool), block_size=4)
    (choice,) = udlkernels.explain(U.block_sparse_attention, *wide, **args).choices
    assert choice.implementation == "reference" and "513" in str(choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.ones(4, 3, 5)), r"q: expected 4 dimensions \[B, H, T, D\], got"),
        (dict(k=torch.ones(2, 3, 6, 5)), "k: expected heads that divide q's 4"),
        (dict(v=torch.ones(2, 2, 7, 5)), r"v: expected 2 heads of 6 rows \(k's\)"),
        (dict(block_size=0), "block_size: expected an integer >= 1, got 0"),
        (dict(block_size=2.0), "block_size: expected an integer >= 1"),
        (dict(block_mask=torch.ones(2, 3)), r"block_mask: expected bool, shape \[2, 3\] or"),
        (dict(block_mask=torch.ones(3, 6) > 0), r"\(blocks of 2\), got bool\[3, 6\]"),
        (dict(block_mask=torch.ones(4, 2, 3) > 0), r"\[2 or 1, 4 or 1, 2, 3\] \(blocks of 2\)"),
        (dict(block_mask=torch.ones(2, 2, 2, 3) > 0), "block_mask: expected bool, shape"),
        (dict(block_mask=torch.ones(2, 3, device="meta") > 0), "block_mask: .* a tensor on cpu"),
        (
            dict(block_mask=patterns.full(2, 3)),
            r"block_mask: .*\(a pattern's is its .mask\), got P",
        ),
        (dict(causal=True), "causal: expected one of"),
        (dict(scale=math.inf), "scale: expected None or a finite number"),
        (dict(implementation="torch"), "PyTorch has no such op"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input(change, message):
    given = dict(q=torch.ones(2, 4, 3, 5), k=torch.ones(2, 2, 6, 5), v=torch.ones(2, 2, 6, 5))
    given |= dict(block_mask=torch.ones(2, 3, dtype=torch.bool), block_size=2)
    with pytest.raises(udlkernels.ArgumentError, match=message) as error:
        U.block_sparse_attention(**(given | change))
    assert str(error.value).startswith("[block_sparse_attention] ")
