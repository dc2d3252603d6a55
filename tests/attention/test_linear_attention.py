"""linear_attention: values, gradients, states, layouts, compilation, determinism, errors."""

from __future__ import annotations

import math

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
from udlkernels.attention.linear_attention import reference

# B, H, Hkv, T, D, Dv
SHAPES = [
    (2, 4, 2, 5, 16, 8),
    (1, 4, 1, 63, 7, 9),
    (2, 3, 1, 65, 33, 80),
    (1, 2, 2, 130, 64, 64),
    (1, 1, 1, 200, 100, 5),
    (1, 1, 1, 70, 200, 130),
]
SMALL = [(2, 4, 2, 5, 8, 12), (1, 2, 1, 70, 20, 16), (1, 1, 1, 34, 34, 40)]
ONE_SMALL, ONE = (1, 2, 1, 35, 16, 8), (2, 4, 2, 90, 16, 24)


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inputs(shape, dtype=torch.float32, device="cpu", keys=None, layout="contiguous"):
    b, h, hkv, t, d, dv = shape
    keys = t if keys is None else keys
    shapes = [(b, h, t, d), (b, hkv, keys, d), (b, hkv, keys, dv)]
    return [
        testing.make(s, dtype, layout=layout, device=device, seed=i) for i, s in enumerate(shapes)
    ]


def _state(shape, dtype=torch.float32, device="cpu"):
    """A state as if some keys had been summed: z is positive."""
    b, _, hkv, _, d, dv = shape
    kv = testing.make((b, hkv, d, dv), _wide(dtype), device=device, seed=5)
    return [3 * kv, 1 + 9 * testing.make((b, hkv, d), _wide(dtype), device=device, seed=6).abs()]


def _function(function, **options):
    """The function of (q, k, v, kv, z), so that the state has gradients; gives (out, kv, z)."""

    def call(q, k, v, kv=None, z=None):
        state = None if kv is None else (kv, z)
        found = function(q, k, v, state=state, **options)
        return (found[0], *found[1]) if options.get("return_state") else found

    return call


def _kernel(q, k, v, **options):
    return U.linear_attention(q, k, v, **options, implementation="kernel")


def _reduction(shape, keys=None):
    """Products over D and Dv, then over keys or a group's queries: the sums behind one gradient."""
    _, h, hkv, t, d, dv = shape
    return d + dv + max(t * h // hkv, keys or t)


def _compare(shape, tensors, keys=None, **options):
    formula = _function(reference.linear_attention, **options)
    return testing.compare(
        _function(_kernel, **options), formula, [formula], tensors,
        reduction=_reduction(shape, keys),
    )  # fmt: skip


def _one(backend):
    return ONE_SMALL if backend.small else ONE


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values_and_gradients(every_backend, dtype, causal):
    for shape in SMALL if every_backend.small else SHAPES:
        keys = shape[3] if causal else shape[3] + 7
        tensors = _inputs(shape, dtype, every_backend.device, keys)
        _compare(shape, tensors, keys, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_state(backend, dtype, causal):
    """The state given joins the sums, the one returned has all keys; both have gradients."""
    for shape in SMALL[1:2] if backend.small else SHAPES[:5]:
        tensors = _inputs(shape, dtype, backend.device)
        _compare(shape, tensors, causal=causal, return_state=True)
        tensors += _state(shape, dtype, backend.device)
        found = _compare(shape, tensors, causal=causal, return_state=True)
        assert found.outputs[1].dtype == found.gradients[3].dtype == _wide(dtype)
        _compare(shape, tensors, causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("feature_map", ["relu", "identity", "function"])
def test_feature_maps(backend, dtype, causal, feature_map):
    if feature_map == "function":
        feature_map = _squares
    shape = _one(backend)
    tensors = _inputs(shape, dtype, backend.device)
    if feature_map == "identity":
        # Positive features, for a denominator that is not near 0.
        tensors[:2] = [t.abs() for t in tensors[:2]]
    _compare(shape, tensors, causal=causal, feature_map=feature_map)


def _squares(x):
    """Positive features, of another width."""
    return torch.cat((x * x, x.abs() + 0.5), -1)


def test_default_is_elu_plus_one(backend):
    q, k, v = _inputs(_one(backend), device=backend.device)
    by_function = _kernel(q, k, v, feature_map=lambda x: F.elu(x) + 1, causal=True)
    formula = reference.linear_attention(q.double(), k.double(), v.double(), causal=True)
    testing.check(_kernel(q, k, v, causal=True), formula, [by_function], reduction=q.shape[2])


def test_the_formula_is_the_recurrence():
    """out_i from sums over the keys so far, one key at a time."""
    q, k, v = _inputs((1, 1, 1, 9, 4, 3), torch.float64)
    kv, z = (t.double() for t in _state((1, 1, 1, 9, 4, 3), torch.float64))
    found = reference.linear_attention(q, k, v, causal=True, state=(kv, z))
    kv, z = kv[0, 0], z[0, 0]
    for i in range(9):
        features = F.elu(k[0, 0, i]) + 1
        kv, z = kv + features[:, None] * v[0, 0, i], z + features
        weights = F.elu(q[0, 0, i]) + 1
        testing.check(found[0, 0, i], weights @ kv / (weights @ z), [])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    shape = _one(backend)
    tensors = _inputs(shape, dtype, backend.device, layout=layout)
    if not backend.small:
        _compare(shape, tensors)
    state = [testing.lay_out(t, layout) for t in _state(shape, dtype, backend.device)]
    _compare(shape, [*tensors, *state], causal=True, return_state=True)


def test_strided_gradients(backend):
    """Gradients of results that come back expanded or transposed."""
    shape = _one(backend)
    q, k, v = (t.requires_grad_() for t in _inputs(shape, device=backend.device))
    out = _kernel(q, k, v, causal=True)
    wanted = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    found = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    dout = testing.make(out.mT.shape, device=backend.device).mT
    wanted = torch.autograd.grad(out, (q, k, v), dout.contiguous(), retain_graph=True)
    found = torch.autograd.grad(out, (q, k, v), dout)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients_only_where_wanted(backend, causal):
    shape = _one(backend)
    tensors = [*_inputs(shape, device=backend.device), *_state(shape, device=backend.device)]
    function = _function(_kernel, causal=causal, return_state=True)
    whole = testing.run(function, tensors).gradients
    for i in range(5):
        some = [t.detach().requires_grad_(i == n) for n, t in enumerate(tensors)]
        outputs = function(*some)
        pairs = zip(outputs, testing.make_cotangents(outputs), strict=True)
        outputs, cotangents = zip(*[p for p in pairs if p[0].requires_grad], strict=True)
        (found,) = torch.autograd.grad(outputs, some[i], cotangents)
        assert torch.equal(found, whole[i])


def test_the_state_alone_has_a_gradient(backend):
    shape = _one(backend)
    tensors = [*_inputs(shape, device=backend.device), *_state(shape, device=backend.device)]

    def part(function, index):
        return lambda *t: _function(function, causal=True, return_state=True)(*t)[index]

    for index in (1, 2):
        formula = part(reference.linear_attention, index)
        found = testing.compare(
            part(_kernel, index), formula, [formula], tensors, reduction=_reduction(shape)
        )
        assert found.gradients[1].any()


@pytest.mark.parametrize("cut", [1, 33, 64, 70])
def test_pieces_equal_the_whole(backend, dtype, cut):
    shape = (1, 2, 1, 72, 16, 8) if backend.small else (2, 4, 2, 150, 16, 24)
    given = _inputs(shape, dtype, backend.device)

    def in_pieces(q, k, v):
        outs, state = [], None
        for part in (slice(0, cut), slice(cut, None)):
            rows = (t[:, :, part] for t in (q, k, v))
            out, state = _kernel(*rows, causal=True, state=state, return_state=True)
            outs.append(out)
        return torch.cat(outs, 2), *state

    formula = _function(reference.linear_attention, causal=True, return_state=True)
    testing.compare(in_pieces, formula, [formula], given, reduction=_reduction(shape))


def test_decoding_equals_the_causal_rows(backend, dtype):
    shape = (1, 2, 1, 4, 16, 8) if backend.small else (2, 4, 2, 70, 16, 24)
    q, k, v = _inputs(shape, dtype, backend.device)
    exact = reference.linear_attention(q.double(), k.double(), v.double(), causal=True)
    whole = _kernel(q, k, v, causal=True)
    state = None
    for i in range(shape[3]):
        row = (t[:, :, i : i + 1] for t in (q, k, v))
        out, state = _kernel(*row, causal=True, state=state, return_state=True)
        testing.check(
            out, exact[:, :, i : i + 1], [whole[:, :, i : i + 1]], reduction=_reduction(shape)
        )


def test_order_of_keys_does_not_matter(backend):
    shape = _one(backend)
    q, k, v = _inputs(shape, device=backend.device)
    turned = _kernel(q, k.flip(2), v.flip(2))
    exact = reference.linear_attention(q.double(), k.double(), v.double())
    testing.check(turned, exact, [_kernel(q, k, v)], reduction=_reduction(shape))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradcheck_on_the_kernel(causal):
    shape = (1, 2, 1, 5, 3, 2)
    tensors = [*_inputs(shape, torch.float64), *_state(shape, torch.float64)]
    tensors = [t.requires_grad_() for t in tensors]
    for feature_map in ("elu_plus_one", "relu"):
        function = _function(_kernel, causal=causal, return_state=True, feature_map=feature_map)
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)
    long = [t.requires_grad_() for t in _inputs((1, 1, 1, 67, 2, 2), torch.float64)]
    assert torch.autograd.gradcheck(_function(_kernel, causal=causal), long)


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, lengths = compiler.split("-")
    ops = ("linear_attention_fwd", "linear_attention_bwd")
    sets = [[*_inputs((2, 4, 2, n, 6, 7)), *_state((2, 4, 2, n, 6, 7))] for n in (70, 9)]
    options = dict(causal=True, return_state=True)
    assert_compiles(_function(_kernel, **options), sets, ops, name, lengths == "dynamic")
    if lengths == "static":
        plain = _function(_kernel, feature_map=torch.square)
        assert_compiles(plain, [sets[0][:3]], ops, name)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_opcheck(causal):
    op = torch.ops.udlkernels
    shape = (2, 4, 2, 70, 6, 7)
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = _inputs(shape, dtype)
        for state in ((None, None), _state(shape, dtype)):
            args = (q, k, v, *state, 1, causal)
            out, kv, z = op.linear_attention_fwd(*args)
            assert_opcheck(op.linear_attention_fwd, args)
            start = state if causal else (kv, z)
            none = (None, None), (False, True, False)
            for after, wanted in (((kv, z), (True, True, True)), none):
                args = (out, *after, q, k, v, *start, 1, causal, *wanted)
                assert_opcheck(op.linear_attention_bwd, args)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_same_bits_at_any_thread_count(dtype_any, causal):
    """One head is cut into chunks where there are several threads, four or eight are not."""
    for shape in [(1, 1, 1, 700, 32, 40), (1, 3, 1, 300, 16, 16), (4, 4, 2, 200, 16, 24)]:
        tensors = [*_inputs(shape, dtype_any), *_state(shape, dtype_any)]
        function = _function(_kernel, causal=causal, return_state=True)
        assert_deterministic(function, tensors)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_samples_do_not_depend_on_each_other(backend, dtype, causal):
    shape = (6, 2, 1, 9, 8, 8) if backend.small else (7, 4, 2, 90, 16, 24)
    tensors = [*_inputs(shape, dtype, backend.device), *_state(shape, dtype, backend.device)]
    function = _function(_kernel, causal=causal, return_state=True)
    assert_rows_independent(function, tensors, (0, 1, 2, 3, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_later_keys_leave_no_trace(backend, bad):
    """NaN or Inf in keys, values and queries that come later: the same bits as zeros there."""
    # In Triton they may reach the other rows of their block of 64.
    on_cpu = backend.name.startswith("cpu-")
    shape, first = ((1, 4, 2, 150, 16, 24), 75) if on_cpu else ((1, 2, 1, 72, 8, 8), 64)
    results = []
    for filler in (0.0, bad):
        tensors = _inputs(shape, device=backend.device)
        for t in tensors:
            t[:, :, first:] = filler
        q, k, v = (t.requires_grad_() for t in tensors)
        out = _kernel(q, k, v, causal=True)[:, :, :first]
        (dq,) = torch.autograd.grad(out.square().sum(), q)
        results.append((out, dq[:, :, :first]))
    for clean, found in zip(*results, strict=True):
        assert torch.equal(found, clean) and found.isfinite().all() and found.any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_not_finite_reaches_who_sees_it(backend, causal):
    shape = (1, 2, 1, 70, 8, 8)
    for place in range(2):
        tensors = _inputs(shape, device=backend.device)
        tensors[1 + place][:, :, 64] = math.nan
        out = _kernel(*tensors, causal=causal)
        assert out[:, :, 64 if causal else 0 :].isnan().all()
        testing.check(
            out, reference.linear_attention(*(t.double() for t in tensors), causal=causal),
            [reference.linear_attention(*tensors, causal=causal)], reduction=_reduction(shape),
        )  # fmt: skip


def test_denominator_of_zero(backend, dtype):
    """relu of negative numbers is 0: rows of zeros, without a gradient."""
    shape = _one(backend)
    q, k, v = _inputs(shape, dtype, backend.device)
    q[:, :, [1, 3]] = -q[:, :, [1, 3]].abs() - 1
    k[:, :, :3] = -k[:, :, :3].abs() - 1
    for causal in (False, True):
        found = _compare(shape, [q, k, v], causal=causal, feature_map="relu")
        empty = [0, 1, 2, 3] if causal else [1, 3]
        assert not found.outputs[0][:, :, empty].any()
        assert not found.gradients[0][:, :, empty].any()


@pytest.mark.parametrize("values", ["large", "denormal", "constant", "zeros"])
def test_values(backend, dtype, values):
    """Features beyond the type's squares, and next to nothing: outputs are means all the same."""
    shape = _one(backend)
    q, k, v = _inputs(shape, dtype, backend.device)
    q, k = (testing.make(t.shape, dtype, values, device=backend.device) for t in (q, k))
    formula = _function(reference.linear_attention, causal=True)
    testing.compare(
        _function(_kernel, causal=True), formula, [formula], [q, k, v], gradients=False,
        reduction=_reduction(shape),
    )  # fmt: skip


def test_negative_keys_keep_their_digits(backend):
    """elu(x) + 1 of -20 is exp(-20), not what is left of 1 - 1."""
    q, k, v = _inputs(_one(backend), device=backend.device)
    k = k - 20
    exact = reference.linear_attention(q.double(), k.double(), v.double())
    testing.check(_kernel(q, k, v), exact, [], reduction=k.shape[2])


# Without samples, queries, keys, values' width, width.
EMPTY = [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 5, 0), (2, 3, 4, 0, 6)]


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes):
    b, t, s, d, dv = sizes
    shapes = [(b, 2, t, d), (b, 1, s, d), (b, 1, s, dv)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out, (kv, z) = U.linear_attention(*tensors, return_state=True)
    assert (out.shape, kv.shape, z.shape) == ((b, 2, t, dv), (b, 1, d, dv), (b, 1, d))
    assert s > 0 or not (out.any() or kv.any() or z.any())
    gradients = torch.autograd.grad(out.sum() + kv.sum() + z.sum(), tensors)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


def test_results_are_contiguous(backend):
    q, k, v = _inputs(_one(backend), device=backend.device, layout="transposed")
    out, (kv, z) = _kernel(q, k, v, return_state=True)
    assert out.is_contiguous() and kv.is_contiguous() and z.is_contiguous()


def test_autocast_and_transforms():
    q, k, v = _inputs((2, 4, 2, 9, 8, 6))
    state = _state((2, 4, 2, 9, 8, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = U.linear_attention(q, k, v, state=state)
    assert torch.equal(out, U.linear_attention(*(t.bfloat16() for t in (q, k, v)), state=state))
    by_sample = torch.func.vmap(lambda *t: U.linear_attention(*(x[None] for x in t))[0])(q, k, v)
    exact = reference.linear_attention(q.double(), k.double(), v.double())
    testing.check(by_sample, exact, [U.linear_attention(q, k, v)])


def test_explain():
    q, k, v = _inputs((2, 4, 2, 9, 8, 6))
    (choice,) = udlkernels.explain(U.linear_attention, q, k, v).choices
    assert choice.implementation == "kernel"
    (choice,) = udlkernels.explain(U.linear_attention, q, k[:, :, :0], v[:, :, :0]).choices
    assert choice.implementation == "reference" and "no elements" in str(choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.ones(4, 3, 5)), r"q: expected 4 dimensions \[B, H, T, D\], got"),
        (dict(q=torch.ones(2, 4, 3, 5).int()), "q: expected a floating point tensor, got"),
        (dict(k=torch.ones(2, 2, 6, 5).half()), r"k: expected torch.float32 \(q's type\), got"),
        (dict(v=torch.ones(2, 2, 6, 5, device="meta")), "v: expected a tensor on cpu"),
        (dict(k=torch.ones(3, 2, 6, 5)), r"k: expected a batch of 2 \(q's\)"),
        (dict(k=torch.ones(2, 2, 6, 4)), r"k: expected width 5 \(q's\)"),
        (dict(k=torch.ones(2, 3, 6, 5)), "k: expected heads that divide q's 4"),
        (dict(v=torch.ones(2, 2, 7, 5)), r"v: expected 2 heads of 6 rows \(k's\)"),
        (dict(causal=True), r"k: expected 3 rows \(q's\) with a causal mask"),
        (dict(feature_map="softmax"), "feature_map: expected a function or one of"),
        (dict(feature_map=1), "feature_map: expected a function or one of"),
        (dict(feature_map=lambda x: x[0]), r"q: expected 4 dimensions \[B, H, T, D\], got"),
        (dict(state=torch.ones(2, 2, 5, 5)), r"state: expected a pair of tensors \(kv, z\)"),
        (dict(state=(torch.ones(2, 2, 5, 5), None)), "state: expected a pair of tensors"),
        (
            dict(state=(torch.ones(2, 4, 5, 7), torch.ones(2, 2, 5))),
            r"state: expected kv of torch.float32, shape \[2, 2, 5, 7\]",
        ),
        (
            dict(state=(torch.ones(2, 2, 5, 7), torch.ones(2, 2, 7))),
            r"state: expected z of torch.float32, shape \[2, 2, 5\]",
        ),
        (
            dict(state=(torch.ones(2, 2, 5, 7).double(), torch.ones(2, 2, 5))),
            "state: expected kv of torch.float32",
        ),
        (
            dict(state=(torch.ones(2, 2, 5, 7, device="meta"), torch.ones(2, 2, 5))),
            "state: expected tensors on cpu",
        ),
        (dict(implementation="fast"), "implementation: expected one of"),
        (dict(implementation="torch"), "PyTorch has no such op"),
        (
            dict(k=torch.ones(2, 2, 0, 5), v=torch.ones(2, 2, 0, 5), implementation="kernel"),
            "no elements",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input(change, message):
    tensors = dict(q=torch.ones(2, 4, 3, 5), k=torch.ones(2, 2, 6, 5), v=torch.ones(2, 2, 6, 7))
    with pytest.raises(udlkernels.ArgumentError, match=message) as error:
        U.linear_attention(**(tensors | change))
    assert str(error.value).startswith("[linear_attention] ")
