"""attention: values, gradients, options, layouts, compilation, determinism, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.support import (
    assert_compiles,
    assert_deterministic,
    assert_opcheck,
    assert_rows_independent,
)
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.attention.attention import reference

# B, H, Hkv, T, S, D, Dv
SHAPES = [
    (2, 4, 4, 5, 7, 8, 8),
    (1, 4, 1, 1, 300, 16, 5),
    (2, 4, 2, 63, 33, 7, 9),
    (1, 2, 2, 70, 130, 64, 64),
    (2, 3, 1, 65, 65, 33, 80),
    (1, 2, 1, 3, 129, 128, 1),
    (1, 1, 1, 600, 9, 1, 16),
    (1, 1, 1, 2, 3, 512, 511),
]
SMALL = [(1, 2, 1, 7, 13, 12, 14), (2, 2, 2, 17, 20, 8, 8)]
# What each option adds to a call on [2, 4, 5, ...] queries and 7 keys (or the backend's own sizes).
OPTIONS = {
    "top_left": lambda s: dict(causal="top_left"),
    "bottom_right": lambda s: dict(causal="bottom_right"),
    "window": lambda s: dict(window=(3, 2)),
    "left_window": lambda s: dict(window=(2, None)),
    "mask": lambda s: dict(mask=_mask(s, (s[0], 1, s[3], s[4]))),
    "bias": lambda s: dict(bias=testing.make((s[1], 1, s[4]), s.dtype, device=s.device, seed=4)),
    "key_lengths": lambda s: dict(key_lengths=torch.arange(s[0], device=s.device) % 2 + s[4] - 3),
    "alibi_slopes": lambda s: dict(alibi_slopes=0.5 ** torch.arange(1.0, s[1] + 1).to(s.device)),
    "softcap": lambda s: dict(softcap=1.5),
    "sinks": lambda s: dict(sinks=testing.make((s[1],), s.dtype, device=s.device, seed=5)),
    "scale": lambda s: dict(scale=-0.3),
    "dropout_p": lambda s: dict(dropout_p=0.4, seed=torch.tensor([77], device=s.device)),
    "layout": lambda s: dict(layout="bthd"),
    "return_lse": lambda s: dict(return_lse=True),
}


class _Sizes(tuple):
    """A shape of `SHAPES` with what the tensors are made of."""

    dtype = torch.float32
    device = "cpu"


def _sizes(shape, dtype=torch.float32, device="cpu"):
    sizes = _Sizes(shape)
    sizes.dtype, sizes.device = dtype, device
    return sizes


def _mask(sizes, shape):
    generator = torch.Generator().manual_seed(3)
    return (torch.rand(shape, generator=generator) > 0.4).to(sizes.device)


def _inputs(sizes, layout="contiguous", values="normal", heads_last=False):
    b, h, hkv, t, s, d, dv = sizes
    shapes = [(b, h, t, d), (b, hkv, s, d), (b, hkv, s, dv)]
    if heads_last:
        shapes = [(b, rows, heads, width) for b, heads, rows, width in shapes]
    return [
        testing.make(shape, sizes.dtype, values, layout, sizes.device, seed)
        for seed, shape in enumerate(shapes)
    ]


def _function(function, **options):
    """The function of (q, k, v, bias, sinks); bias and sinks so have gradients."""

    def call(q, k, v, bias=None, sinks=None):
        return function(q, k, v, bias=bias, sinks=sinks, **options)

    return call


def _kernel(q, k, v, **options):
    return U.attention(q, k, v, **options, implementation="kernel")


def _reduction(sizes, *summed):
    """Products over D and Dv, then over keys or a group's queries: the sums behind one gradient."""
    _, h, hkv, t, s, d, dv = sizes
    return d + dv + max(t * h // hkv, s, *summed)


def _compare(sizes, options, peers=(), gradients=True, **inputs):
    """The kernel against the formula, with these options."""
    b, h, _, t, s, *_ = sizes
    bias_sum = b * h * t * s // options["bias"].numel() if "bias" in options else 0
    sinks_sum = b * t * sizes[-1] if "sinks" in options else 0
    options = dict(options)
    tensors = _inputs(sizes, heads_last=options.get("layout") == "bthd", **inputs)
    tensors += [options.pop("bias", None), options.pop("sinks", None)]
    formula = _function(reference.attention, **options)
    return testing.compare(
        _function(_kernel, **options),
        formula,
        [formula, *peers],
        tensors,
        gradients=gradients,
        reduction=_reduction(sizes, bias_sum, sinks_sum),
    )


def _torch(q, k, v, *_):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def test_values_and_gradients(every_backend, dtype):
    for shape in SMALL if every_backend.small else SHAPES:
        _compare(_sizes(shape, dtype, every_backend.device), {}, [_torch])


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(backend, dtype, option):
    for shape in (
        SMALL[1:] if backend.small else [(2, 4, 2, 33, 50, 16, 24), (1, 2, 2, 90, 70, 32, 32)]
    ):
        sizes = _sizes(shape, dtype, backend.device)
        _compare(sizes, OPTIONS[option](sizes))


@pytest.mark.parametrize("first", list(OPTIONS)[:-1])
def test_pairs_of_options(backend, first):
    """Every two options together: 91 pairs, less the 2 that set the same argument."""
    sizes = _sizes((2, 2, 1, 6, 10, 12, 10) if backend.small else (2, 4, 2, 21, 40, 9, 12))
    sizes.device = backend.device
    names = list(OPTIONS)
    for second in names[names.index(first) + 1 :]:
        one, other = OPTIONS[first](sizes), OPTIONS[second](sizes)
        if not one.keys() & other.keys():
            _compare(sizes, one | other)


def test_pairs_are_counted():
    sizes = _sizes(SHAPES[0])
    pairs = itertools.combinations((option(sizes) for option in OPTIONS.values()), 2)
    assert sum(not one.keys() & other.keys() for one, other in pairs) == 91 - 2


def test_all_options_at_once(backend, dtype):
    sizes = _sizes((2, 2, 1, 6, 11, 4, 3) if backend.small else (2, 4, 2, 45, 70, 20, 12))
    sizes.dtype, sizes.device = dtype, backend.device
    options = {}
    for option in OPTIONS.values():
        options |= option(sizes)
    _compare(sizes, options | dict(window=(9, 4)))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    for shape in [(2, 2, 1, 5, 9, 4, 3)] if backend.small else [(2, 4, 2, 21, 40, 9, 12)]:
        sizes = _sizes(shape, dtype, backend.device)
        _compare(sizes, {}, [_torch], layout=layout)
        _compare(sizes, dict(layout="bthd"), layout=layout)


@pytest.mark.parametrize("values", testing.VALUES)
def test_values(backend, dtype, values):
    sizes = _sizes((1, 2, 1, 6, 9, 8, 8) if backend.small else (2, 4, 2, 21, 60, 16, 16))
    sizes.dtype, sizes.device = dtype, backend.device
    peers = [_torch, reference.attention]
    if (backend.name, dtype, values) == ("cpu-avx512_bf16", torch.bfloat16, "denormal"):
        # This processor's instruction takes them as zeros, as the page on attention says.
        assert not _kernel(*_inputs(sizes, values=values)).any()
        return
    # Elsewhere the gradients are differences of equal numbers, or not finite.
    gradients = values in ("normal", "denormal")
    testing.compare(
        _kernel,
        reference.attention,
        peers,
        _inputs(sizes, values=values),
        gradients=gradients,
        reduction=_reduction(sizes),
    )


# Shapes that broadcast to [2, 2, 12, 20].
SPREADS = [
    (1,),
    (20,),
    (12, 1),
    (12, 20),
    (2, 1, 20),
    (1, 12, 20),
    (2, 1, 1, 1),
    (2, 1, 12, 20),
    (2, 2, 12, 20),
]


@pytest.mark.parametrize("shape", SPREADS, ids=str)
def test_masks_and_biases_broadcast(backend, shape):
    sizes = _sizes((2, 2, 1, 12, 20, 16, 16), device=backend.device)
    mask = _mask(sizes, shape)
    bias = testing.make(shape, device=backend.device, seed=8)
    _compare(sizes, dict(mask=mask))
    # The gradient of a bias that is the same for all keys is 0 but for rounding.
    gradients = shape[-1] > 1
    _compare(sizes, dict(mask=mask, bias=bias), gradients=gradients)
    found = _compare(sizes, dict(bias=bias, causal="top_left"), gradients=gradients)
    assert not gradients or found.gradients[3].shape == bias.shape


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_masks_and_biases(backend, layout):
    sizes = _sizes((2, 2, 1, 12, 20, 32, 32), device=backend.device)
    mask = testing.lay_out(_mask(sizes, (2, 2, 12, 20)).float(), layout).bool()
    bias = testing.make((2, 2, 12, 20), layout=layout, device=backend.device, seed=8)
    _compare(sizes, dict(mask=mask, bias=bias))
    _compare(sizes, dict(mask=mask.mT.contiguous().mT, bias=bias[:, :1]))


def test_types_of_bias_and_sinks(backend, dtype):
    sizes = _sizes((1, 2, 1, 5, 9, 4, 4), dtype, backend.device)
    for other in (torch.float32, torch.bfloat16):
        bias = testing.make((2, 5, 9), other, device=backend.device, seed=8)
        sinks = testing.make((2,), other, device=backend.device, seed=9)
        tensors = [t.requires_grad_() for t in (*_inputs(sizes), bias, sinks)]
        out = _function(_kernel)(*tensors)
        out.sum().backward()
        assert out.dtype == dtype and bias.grad.dtype == other and sinks.grad.dtype == other
        exact = _function(reference.attention)(*(t.double() for t in tensors))
        testing.check(out, exact, [_function(reference.attention)(*tensors)], reduction=9)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_results_are_contiguous_in_their_layout(backend, layout):
    sizes = _sizes((2, 2, 1, 5, 9, 4, 6), device=backend.device)
    q, k, v = _inputs(sizes, heads_last=layout == "bthd")
    out, lse = _kernel(q, k, v, layout=layout, return_lse=True)
    assert out.shape == (*q.shape[:3], 6) and out.is_contiguous()
    assert lse.shape == (2, 2, 5) and lse.is_contiguous() and lse.dtype == torch.float32


def test_lse_alone_has_a_gradient(backend, dtype):
    sizes = _sizes((2, 2, 1, 5, 9, 4, 6), dtype, backend.device)
    tensors = [*_inputs(sizes)[:2], testing.make((5, 9), dtype, device=backend.device, seed=8)]

    def lse(function):
        def call(q, k, bias):
            return function(q, k, k, bias=bias, return_lse=True, causal="bottom_right")[1]

        return call

    formula = lse(reference.attention)
    testing.compare(lse(_kernel), formula, [formula], tensors, reduction=9)


def test_gradcheck_on_the_kernel():
    sizes = _sizes((1, 2, 1, 3, 4, 3, 2), torch.float64)
    bias, sinks = testing.make((2, 1, 4), torch.float64), testing.make((2,), torch.float64)
    tensors = [t.requires_grad_() for t in (*_inputs(sizes), bias, sinks)]
    options = dict(causal="bottom_right", softcap=2.0, return_lse=True)
    mask = torch.tensor([[False] * 4, [True] * 4, [True, False, True, True]])
    dropped = dict(dropout_p=0.3, seed=torch.tensor([3]), layout="bhtd", mask=mask)
    for more in ({}, options, dropped):
        function = _function(_kernel, **more)
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


def test_gradients_only_where_wanted(backend):
    sizes = _sizes((1, 2, 1, 5, 9, 4, 6), device=backend.device)
    bias, sinks = OPTIONS["bias"](sizes)["bias"], OPTIONS["sinks"](sizes)["sinks"]
    tensors = [*_inputs(sizes), bias, sinks]
    whole = testing.run(_function(_kernel), tensors).gradients
    for i in range(5):
        some = [t.detach().requires_grad_(i == n) for n, t in enumerate(tensors)]
        out = _function(_kernel)(*some)
        (found,) = torch.autograd.grad(out, some[i], *testing.make_cotangents([out]))
        assert torch.equal(found, whole[i])


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    ops = ("attention_fwd", "attention_bwd")
    sets = []
    for n in (5, 8):
        sizes = _sizes((2, 4, 2, n, n + 3, 6, 7))
        sets.append([*_inputs(sizes), *(OPTIONS[o](sizes)[o] for o in ("bias", "sinks"))])
    options = dict(causal="top_left", softcap=3.0, return_lse=True)
    assert_compiles(_function(_kernel, **options), sets, ops, name, shapes == "dynamic")
    if compiler == "aot_eager-static":  # Inductor draws other seeds than eager
        dropped = dict(dropout_p=0.2, window=(4, 4), causal="bottom_right", layout="bhtd")
        assert_compiles(_function(_kernel, **dropped), sets[:1], ops, name)
        assert_compiles(_kernel, [_inputs(_sizes(SHAPES[0]))], ops, name)


def test_compiled_with_every_tensor():
    sizes = _sizes((2, 4, 2, 5, 8, 6, 7))
    names = ("mask", "key_lengths", "alibi_slopes")
    options = {name: OPTIONS[name](sizes)[name] for name in names}
    tensors = _inputs(sizes, heads_last=True)
    function = _function(_kernel, layout="bthd", **options)
    assert_compiles(function, [tensors], ("attention_fwd", "attention_bwd"))


@pytest.mark.parametrize("heads_last", [False, True], ids=["bhtd", "bthd"])
def test_opcheck(heads_last):
    op = torch.ops.udlkernels
    sizes = _sizes((2, 4, 2, 5, 8, 6, 7))
    q, k, v = _inputs(sizes)
    mask = _mask(sizes, (2, 1, 5, 8)).expand(2, 4, 5, 8)
    bias = testing.make((1, 4, 1, 8)).expand(2, 4, 5, 8)
    lengths, slopes, sinks = torch.tensor([3, 8]), torch.rand(2, 4), torch.randn(4)
    ranges = torch.tensor([[1, 8]]).expand(2, 5, 2)
    blocks = torch.tensor([[True, False], [True, True]]).expand(2, 4, 2, 2)
    numbers = (1, 3, 2**62, 0.4, 2.0, 0.25, torch.tensor([5]), heads_last)
    everything = (mask, bias, lengths, slopes, sinks, ranges, blocks, 4)
    none = (*(None,) * 7, 0)
    plain = (0, 2**62, 2**62, 0.4, 0.0, 0.0, None, heads_last)
    for extras, last in ((none, plain), (everything, numbers)):
        args = (q, k, v, *extras, *last)
        out, lse = op.attention_fwd(*args)
        assert_opcheck(op.attention_fwd, args)
        given = extras[1] is not None
        wanted = (True, True, given, given)
        dlse = lse.clone() if given else None
        assert_opcheck(op.attention_bwd, (out, dlse, q, k, v, out, lse, *extras, *last, *wanted))
        few = (False, False, given, False) if given else (True, False, False, False)
        assert_opcheck(op.attention_bwd, (out, None, q, k, v, out, lse, *extras, *last, *few))


def test_same_bits_at_any_thread_count(dtype_any):
    for shape in [(3, 4, 2, 130, 140, 16, 24), (1, 2, 1, 1, 700, 32, 32), (2, 2, 2, 300, 40, 8, 8)]:
        sizes = _sizes(shape, dtype_any)
        extras = [OPTIONS[name](sizes)[name] for name in ("bias", "sinks")]
        assert_deterministic(_kernel, _inputs(sizes))
        more = dict(causal="bottom_right", return_lse=True, dropout_p=0.1, seed=torch.tensor([9]))
        assert_deterministic(_function(_kernel, **more), [*_inputs(sizes), *extras])


def test_samples_do_not_depend_on_each_other(backend, dtype):
    shape = (6, 2, 1, 5, 9, 4, 3) if backend.small else (7, 4, 2, 70, 90, 16, 24)
    sizes = _sizes(shape, dtype, backend.device)
    assert_rows_independent(_kernel, _inputs(sizes), (0, 1, 2))
    bias = testing.make((sizes[0], 1, 1, sizes[4]), dtype, device=backend.device, seed=4)
    function = _function(_kernel, causal="bottom_right", return_lse=True)
    assert_rows_independent(function, [*_inputs(sizes), bias], (0, 1, 2, 3))


def test_queries_do_not_depend_on_each_other(backend, dtype):
    if backend.small:
        pytest.skip("the interpreter's NumPy products round by a row's place in the tile")
    sizes = _sizes((1, 2, 1, 150, 90, 16, 24), dtype, backend.device)
    q, k, v = _inputs(sizes)
    whole = _kernel(q, k, v)
    for part in (slice(0, 1), slice(3, 5), slice(7, None)):
        assert torch.equal(_kernel(q[:, :, part], k, v), whole[:, :, part])


def _hidden(sizes):
    """Options that hide the keys from 6 on, from every query."""
    hide = torch.arange(sizes[4], device=sizes.device) >= 6
    return [
        dict(mask=~hide),
        dict(mask=(~hide).expand(sizes[3], sizes[4]).contiguous()),
        dict(bias=torch.zeros(sizes[4], device=sizes.device).masked_fill(hide, -math.inf)),
        dict(key_lengths=torch.full((sizes[0],), 6, device=sizes.device)),
        dict(window=(None, 6 - sizes[3])) if sizes[3] <= 6 else dict(mask=~hide, causal="top_left"),
    ]


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_hidden_keys_leave_no_trace(backend, case, bad):
    """NaN or Inf in keys and values that no query sees: the same bits as zeros there."""
    for shape in [(2, 2, 1, 5, 9, 4, 3), (2, 2, 1, 5, 90, 20, 24)][: 1 if backend.small else 2]:
        sizes = _sizes(shape, device=backend.device)
        options = _hidden(sizes)[case]
        bias = options.pop("bias", None)
        q, k, v = _inputs(sizes)
        results = []
        for filler in (0.0, bad):
            k[:, :, 6:], v[:, :, 6:] = filler, filler
            call = _function(_kernel, return_lse=True, **options)
            results.append(testing.run(call, [q, k.clone(), v.clone(), bias]))
        clean, found = results
        for ours, theirs in zip(found.outputs, clean.outputs, strict=True):
            assert torch.equal(ours, theirs) and ours.isfinite().all()
        for ours, theirs in zip(found.gradients[:4], clean.gradients[:4], strict=True):
            assert theirs is None or (torch.equal(ours, theirs) and ours.isfinite().all())


@pytest.mark.parametrize("causal", [False, True], ids=["hidden", "causal"])
def test_hidden_keys_have_no_gradient(backend, dtype, causal):
    """NaN keys that no query sees, also where an odd number of queries leaves half a pair."""
    for queries in (5, 6):
        sizes = _sizes((2, 2, 1, queries, 11, 4, 6), dtype, backend.device)
        # The first key behind the diagonal is the one that a further query would see.
        first = queries if causal else 6
        options = dict(causal="top_left") if causal else _hidden(sizes)[1]
        q, k, v = _inputs(sizes)
        k[:, :, first:], v[:, :, first:] = math.nan, math.inf
        found = testing.run(_function(_kernel, **options), [q, k, v])
        assert all(bool(t.isfinite().all()) for t in (*found.outputs, *found.gradients[:3]))
        for gradient in found.gradients[1:3]:
            assert gradient[:, :, :first].any() and not gradient[:, :, first:].any()


def test_the_formula_hides_keys_from_some_queries():
    q, k, v = (t.requires_grad_() for t in _inputs(_sizes((1, 1, 1, 4, 6, 3, 3), torch.float64)))
    expected = reference.attention(q, k, v, causal="top_left")
    bad_k, bad_v = (t.detach().clone().requires_grad_() for t in (k, v))
    with torch.no_grad():
        bad_k[:, :, 3], bad_v[:, :, 2, 1] = math.nan, math.inf
    found = reference.attention(q, bad_k, bad_v, causal="top_left")
    assert torch.equal(found[:, :, :2], expected[:, :, :2])
    assert found[0, 0, 2, 1].isinf() and found[0, 0, 3].isnan().all()
    wanted = torch.autograd.grad(expected[:, :, :2].sum(), (k, v), retain_graph=True)
    ours = torch.autograd.grad(found[:, :, :2].sum(), (q, bad_k, bad_v))
    assert ours[0][:, :, :3].isfinite().all()
    assert [t.shape for t in ours[1:]] == [t.shape for t in wanted]


def test_rows_that_see_nothing(backend, dtype):
    sizes = _sizes((2, 2, 1, 5, 9, 4, 3), dtype, backend.device)
    mask = torch.ones(5, 9, dtype=torch.bool, device=backend.device)
    mask[1] = mask[4] = False
    sinks = testing.make((2,), dtype, device=backend.device, seed=5)
    for options in (dict(mask=mask), dict(bias=torch.where(mask, 0.0, -math.inf).to(dtype))):
        found = _compare(sizes, options | dict(return_lse=True))
        out, lse = found.outputs
        assert not out[:, :, [1, 4]].any() and not found.gradients[0][:, :, [1, 4]].any()
        assert (lse[:, :, [1, 4]] == -math.inf).all()
        found = _compare(sizes, options | dict(return_lse=True, sinks=sinks))
        assert not found.outputs[0][:, :, [1, 4]].any()
        testing.check(found.outputs[1][:, :, 1], sinks.expand(2, 2), [])
    # Top-left, behind a window: more queries than keys leave the last without any.
    found = _compare(_sizes((1, 1, 1, 9, 3, 4, 4), dtype, backend.device), dict(window=(2, 0)))
    assert not found.outputs[0][:, :, 5:].any()
    found = _compare(sizes, dict(key_lengths=torch.tensor([0, 9], device=backend.device)))
    assert not found.outputs[0][0].any()


# Without samples, queries, keys, values' width, width.
EMPTY = [
    (0, 2, 1, 3, 4, 5, 6),
    (2, 2, 1, 0, 4, 5, 6),
    (2, 2, 1, 3, 0, 5, 6),
    (2, 2, 1, 3, 4, 5, 0),
    (2, 2, 1, 3, 4, 0, 6),
]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape):
    sizes = _sizes(shape)
    tensors = [t.requires_grad_() for t in _inputs(sizes)]
    for layout in ("bhtd", "bthd"):
        given = [t.transpose(1, 2) for t in tensors] if layout == "bthd" else tensors
        out, lse = U.attention(*given, layout=layout, causal="bottom_right", return_lse=True)
        expected = (shape[0], shape[1], shape[3], shape[6])
        assert (out.transpose(1, 2) if layout == "bthd" else out).shape == expected
        assert lse.shape == expected[:3]
        if shape[4] == 0:
            assert not out.any() and (lse == -math.inf).all()
        gradients = torch.autograd.grad(out.sum() + lse.exp().sum(), tensors)
        assert [g.shape for g in gradients] == [t.shape for t in tensors]


def test_dropout(backend):
    sizes = _sizes((2, 2, 1, 5, 9, 4, 3), device=backend.device)
    q, k, v = _inputs(sizes)
    seed = torch.tensor([-5], device=backend.device)
    plain = _kernel(q, k, v)
    assert torch.equal(_kernel(q, k, v, dropout_p=0.0, seed=seed), plain)
    assert not _kernel(q, k, v, dropout_p=1.0, seed=seed).any()
    torch.manual_seed(3)
    first, second = (_kernel(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(_kernel(q, k, v, dropout_p=0.5), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    formula = U.attention(q, k, v, dropout_p=0.5, implementation="reference")
    testing.check(first, formula.double(), [formula], reduction=9)
