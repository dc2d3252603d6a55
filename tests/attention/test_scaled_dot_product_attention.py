"""scaled_dot_product_attention: PyTorch's answer for every rank, mask and layout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import udlkernels
from tests.support import assert_compiles, assert_deterministic, assert_rows_independent
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.attention.attention import reference

# query, key, value
SHAPES = [
    ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    ((1, 2, 65, 16), (1, 2, 33, 16), (1, 2, 33, 24)),
    ((5, 8), (7, 8), (7, 3)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    ((2, 2, 2, 5, 8), (2, 2, 2, 7, 8), (2, 2, 2, 7, 6)),
    ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    ((2, 4, 5, 8), (1, 1, 7, 8), (2, 4, 7, 8)),
    ((2, 4, 5, 8), (4, 7, 8), (7, 8)),
    ((5, 8), (2, 3, 4, 7, 8), (4, 7, 8)),
    ((2, 1, 4, 5, 8), (3, 1, 7, 8), (2, 3, 4, 7, 8)),
]
GROUPED = [
    ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
    ((6, 5, 8), (1, 7, 8), (1, 7, 8)),
    ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)),
    ((2, 4, 5, 8), (1, 2, 7, 8), (2, 2, 7, 8)),
]
MASKS = [
    (),
    (7,),
    (5, 1),
    (5, 7),
    (4, 5, 7),
    (1, 1, 7),
    (2, 1, 5, 7),
    (1, 4, 1, 7),
    (2, 4, 5, 7),
]
DEEP_MASKS = [(5, 7), (2, 1, 7), (2, 1, 5, 7), (1, 1, 1, 5, 7), (2, 1, 2, 5, 7), (2, 2, 2, 5, 7)]


def _inputs(shapes, dtype=torch.float32, device="cpu", layout="contiguous"):
    return [
        testing.make(shape, dtype, "normal", layout, device, seed)
        for seed, shape in enumerate(shapes)
    ]


def _function(function, **options):
    def call(q, k, v, mask=None):
        return function(q, k, v, mask, **options)

    return call


def _kernel(q, k, v, attn_mask=None, **options):
    return U.scaled_dot_product_attention(q, k, v, attn_mask, **options, implementation="kernel")


def _torch(q, k, v, mask=None, **options):
    if mask is not None and mask.dim() < 2:  # PyTorch's fused kernel asks for two dimensions
        mask = mask.expand(q.shape[-2], k.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def _compare(tensors, **options):
    """Our kernels against the formula, with PyTorch's op as the peer."""
    formula = _function(reference.scaled_dot_product_attention, **options)
    q, k, v = tensors[:3]
    return testing.compare(
        _function(_kernel, **options),
        formula,
        [_function(_torch, **options), formula],
        tensors,
        reduction=max(q.shape[-2], k.shape[-2]) + k.shape[-1] + v.shape[-1],
    )


def test_values_and_gradients(every_backend, dtype):
    for shapes in SHAPES[::3] if every_backend.small else SHAPES:
        tensors = _inputs(shapes, dtype, every_backend.device)
        ours = _compare(tensors).outputs[0]
        theirs = F.scaled_dot_product_attention(*tensors)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_the_formula_is_pytorchs():
    for shapes in SHAPES:
        tensors = _inputs(shapes, torch.float64)
        theirs = F.scaled_dot_product_attention(*tensors)
        testing.check(reference.scaled_dot_product_attention(*tensors), theirs, [])


@pytest.mark.parametrize("shapes", GROUPED, ids=str)
def test_grouped_heads(backend, dtype, shapes):
    tensors = _inputs(shapes, dtype, backend.device)
    ours = _compare(tensors, enable_gqa=True, is_causal=True).outputs[0]
    assert ours.shape == F.scaled_dot_product_attention(*tensors, enable_gqa=True).shape


@pytest.mark.parametrize("rows", [(5, 7), (7, 5), (1, 9), (20, 20)], ids=str)
def test_causal_is_top_left(backend, dtype, rows):
    shapes = [(1, 2, rows[0], 8), (1, 2, rows[1], 8), (1, 2, rows[1], 6)]
    tensors = _inputs(shapes, dtype, backend.device)
    _compare(tensors, is_causal=True)
    _compare(tensors, is_causal=True, scale=-0.2)


def _masks(shape, dtype, device):
    """A boolean mask with a row that sees nothing where it has rows, and a float one."""
    boolean = testing.make(shape, seed=8).to(device) > -0.5
    if len(shape) >= 2 and shape[-2] > 1:
        boolean[..., 2, :] = False
    return boolean, testing.make(shape, dtype, device=device, seed=9)


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(backend, dtype, shape):
    tensors = _inputs(SHAPES[0], dtype, backend.device)
    boolean, added = _masks(shape, dtype, backend.device)
    if boolean.any():
        _compare([*tensors, boolean])
    # The gradient of what is the same for all keys is 0 but for rounding.
    gradients = added if shape and shape[-1] > 1 else None
    found = _compare([*tensors, gradients])
    assert gradients is None or found.gradients[3].shape == shape
    hidden = [*tensors, added.masked_fill(~boolean, -math.inf)]
    exact = reference.scaled_dot_product_attention(*(t.double() for t in hidden))
    testing.check(_kernel(*hidden), exact, [_torch(*hidden)], reduction=15)


@pytest.mark.parametrize("shape", DEEP_MASKS, ids=str)
def test_masks_of_deep_inputs(backend, shape):
    tensors = _inputs(SHAPES[4], device=backend.device)
    boolean, added = _masks(shape, torch.float32, backend.device)
    _compare([*tensors, boolean])
    assert _compare([*tensors, added]).gradients[3].shape == shape


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 1, 7), (3, 5, 7)], ids=str)
def test_masks_of_shallow_inputs(backend, shape):
    boolean, added = _masks(shape, torch.float32, backend.device)
    _compare([*_inputs(SHAPES[3], device=backend.device), boolean])
    _compare([*_inputs(SHAPES[3], device=backend.device), added])
    if len(shape) < 3:
        _compare([*_inputs(SHAPES[2], device=backend.device), added])


def test_wide_mask_beside_narrow_queries(backend, dtype):
    tensors = _inputs(SHAPES[0], dtype, backend.device)
    mask = testing.make((4, 5, 7), device=backend.device, seed=9)
    out = _kernel(*tensors, mask)
    exact = reference.scaled_dot_product_attention(*(t.double() for t in (*tensors, mask)))
    testing.check(out, exact, [F.scaled_dot_product_attention(*tensors, mask)], reduction=15)
    leaf = mask.requires_grad_()
    (found,) = torch.autograd.grad(_kernel(*tensors, leaf).sum(), leaf)
    assert found.dtype == torch.float32 and found.shape == mask.shape


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shapes in (SHAPES[0], SHAPES[4]):
        tensors = _inputs(shapes, dtype, backend.device, layout)
        mask = testing.make((*shapes[0][:-1], 7), dtype, "normal", layout, backend.device, seed=9)
        _compare([*tensors, mask])


def test_heads_last_stay_heads_last(backend):
    tensors = _inputs(SHAPES[0], device=backend.device)
    assert _kernel(*tensors).is_contiguous()
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    out = _kernel(*turned)
    assert out.transpose(1, 2).is_contiguous() and torch.equal(out, _kernel(*tensors))
    _compare(turned)


def test_gradcheck_on_the_kernel():
    shapes = [(1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 3)]
    mask = testing.make((2, 1, 4), torch.float64, seed=9)
    tensors = [t.requires_grad_() for t in (*_inputs(shapes, torch.float64), mask)]
    assert torch.autograd.gradcheck(_kernel, tensors)
    assert torch.autograd.gradgradcheck(_kernel, tensors)
    causal = _function(_kernel, is_causal=True)
    assert torch.autograd.gradgradcheck(causal, tensors[:3])


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    ops = ("attention_fwd", "attention_bwd")
    sets = [
        [*_inputs([(2, 4, n, 6), (2, 4, n + 3, 6), (2, 4, n + 3, 7)]), testing.make((n, n + 3))]
        for n in (5, 8)
    ]
    assert_compiles(_kernel, sets, ops, name, shapes == "dynamic")
    if compiler == "aot_eager-static":
        causal = _function(_kernel, is_causal=True, dropout_p=0.2)
        for some in (SHAPES[0], SHAPES[3], SHAPES[4]):
            assert_compiles(causal, [_inputs(some)], ops, name)


def test_same_bits_at_any_thread_count(dtype_any):
    tensors = _inputs([(2, 3, 130, 16), (2, 3, 140, 16), (2, 3, 140, 24)], dtype_any)
    mask = testing.make((130, 140), dtype_any, seed=9)
    assert_deterministic(_kernel, [*tensors, mask])
    assert_deterministic(_function(_kernel, is_causal=True), tensors)


def test_samples_do_not_depend_on_each_other(backend, dtype):
    n = 9 if backend.small else 70
    tensors = _inputs([(6, 2, n, 8), (6, 2, n + 4, 8), (6, 2, n + 4, 8)], dtype, backend.device)
    assert_rows_independent(_function(_kernel, is_causal=True), tensors, (0, 1, 2))


def test_hidden_keys_leave_no_trace(backend):
    """NaN in keys and values that no query sees: the same bits as zeros there."""
    seen = torch.arange(7, device=backend.device) < 4
    for mask in (seen, torch.zeros(7, device=backend.device).masked_fill(~seen, -math.inf)):
        results = []
        for filler in (0.0, math.nan):
            q, k, v = _inputs(SHAPES[0], device=backend.device)
            k[:, :, 4:], v[:, :, 4:] = filler, filler
            results.append(testing.run(_kernel, [q, k, v, mask]))
        clean, found = (r.outputs + r.gradients[:3] for r in results)
        for ours, theirs in zip(found, clean, strict=True):
            assert torch.equal(ours, theirs) and ours.isfinite().all()


# Without samples, heads, queries, keys, width, values' width.
EMPTY = [
    [(0, 2, 3, 4), (0, 2, 5, 4), (0, 2, 5, 6)],
    [(2, 0, 3, 4), (2, 0, 5, 4), (2, 0, 5, 6)],
    [(2, 2, 0, 4), (2, 2, 5, 4), (2, 2, 5, 6)],
    [(2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 6)],
    [(2, 2, 3, 0), (2, 2, 5, 0), (2, 2, 5, 6)],
    [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 0)],
    [(3, 4), (0, 4), (0, 6)],
]


@pytest.mark.parametrize("shapes", EMPTY, ids=str)
def test_empty(shapes):
    for implementation in ("auto", "reference"):
        tensors = [t.requires_grad_() for t in _inputs(shapes)]
        ours = U.scaled_dot_product_attention(*tensors, implementation=implementation)
        theirs = F.scaled_dot_product_attention(*tensors)
        assert ours.shape == theirs.shape
        testing.check(ours, theirs.double(), [theirs])
        gradients = torch.autograd.grad(ours.sum(), tensors, allow_unused=True)
        assert [g is None or g.shape == t.shape for g, t in zip(gradients, tensors, strict=True)]


def test_dropout(backend):
    q, k, v = _inputs(SHAPES[0], device=backend.device)
    torch.manual_seed(3)
    first, second = (_kernel(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(_kernel(q, k, v, dropout_p=0.5), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    formula = U.scaled_dot_product_attention(q, k, v, dropout_p=0.5, implementation="reference")
    testing.check(first, formula.double(), [formula], reduction=15)
    assert not _kernel(q, k, v, dropout_p=1.0).any()


def test_choice():
    def chosen(*tensors, **options):
        (choice,) = udlkernels.explain(U.scaled_dot_product_attention, *tensors, **options).choices
        return choice.implementation

    q, k, v = _inputs(SHAPES[0])
    assert chosen(q, k, v) == "kernel"
    assert chosen(q, k, v, torch.ones(5, 7), dropout_p=0.1) == "kernel"
    assert chosen(q[:, :, :0], k, v) == "torch"
    assert chosen(*(torch.randn(1, 1, 2, 600) for _ in range(3))) == "torch"
    assert chosen(q, k[:, :2], v[:, :4], enable_gqa=True) == "torch"
    assert chosen(q, k, v, implementation="reference") == "reference"
    lower_right = causal_lower_right(5, 7)
    assert chosen(q, k, v, lower_right) == "torch"
    ours = U.scaled_dot_product_attention(q, k, v, lower_right)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, lower_right))
    with pytest.raises(udlkernels.ArgumentError, match="no elements"):
        _kernel(q[:, :, :0], k, v)


def test_autocast_and_transforms():
    q, k, v = _inputs(SHAPES[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = _kernel(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    by_sample = torch.func.vmap(U.scaled_dot_product_attention)(q, k, v)
    testing.check(by_sample, reference.attention(q.double(), k.double(), v.double()), [by_sample])


BAD = {
    "widths": lambda q, k, v: (q, k[..., :5], v),
    "heads": lambda q, k, v: (q, k[:, :3], v[:, :3]),
    "batch": lambda q, k, v: (q, k.expand(2, 4, 7, 8)[:1].expand(3, 4, 7, 8), v),
    "types": lambda q, k, v: (q, k.half(), v),
    "integers": lambda q, k, v: (q.int(), k.int(), v.int()),
    "vector": lambda q, k, v: (q[0, 0, 0], k, v),
    "groups": lambda q, k, v: (q, k[:, :3], v[:, :3], None, 0.0, False, None, True),
    "grouped matrix": lambda q, k, v: (q[0, 0], k[0, 0], v[0, 0], None, 0.0, False, None, True),
    "mask and causal": lambda q, k, v: (q[0], k[0], v[0], torch.ones(5, 7) > 0, 0.0, True),
    "mask shape": lambda q, k, v: (q, k, v, torch.ones(5, 6) > 0),
    "mask type": lambda q, k, v: (q, k, v, torch.ones(5, 7).int()),
    "dropout": lambda q, k, v: (q, k, v, None, 1.5),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_torchs_own_answer(case):
    q, k, v, *rest = BAD[case](*_inputs(SHAPES[0]))
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    options = dict(zip(names, rest, strict=False))
    with pytest.raises(Exception) as theirs:
        F.scaled_dot_product_attention(q, k, v, **options)
    for implementation in ("auto", "torch"):
        with pytest.raises(Exception) as ours:
            U.scaled_dot_product_attention(q, k, v, **options, implementation=implementation)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
    with pytest.raises(udlkernels.ArgumentError, match="which cannot"):
        _kernel(q, k, v, **options)
