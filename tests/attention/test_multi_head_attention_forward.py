"""multi_head_attention_forward: values, gradients, masks, weights, compilation, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import udlkernels
from tests.support import assert_compiles, assert_deterministic, assert_rows_independent
from udlkernels import functional as U
from udlkernels import testing

# N, L, S, E, H
SMALL = (2, 5, 7, 16, 4)
LARGE = (3, 33, 70, 48, 3)
TENSORS = (
    "query", "key", "value", "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias",
    "key_padding_mask", "attn_mask", "bias_k", "bias_v", "static_k", "static_v", "q_proj_weight",
    "k_proj_weight", "v_proj_weight",
)  # fmt: skip
OPS = ("attention_fwd", "attention_bwd")


def _tensors(sizes, dtype=torch.float32, device="cpu", **extra):
    n, length, keys, e, h = sizes
    shapes = dict(
        query=(length, n, e), key=(keys, n, e), value=(keys, n, e), in_proj_weight=(3 * e, e),
        in_proj_bias=(3 * e,), out_proj_weight=(e, e), out_proj_bias=(e,),
    )  # fmt: skip
    found = {
        name: testing.make(shape, dtype, device=device, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    for name in ("in_proj_weight", "out_proj_weight"):
        found[name] = found[name] * e**-0.5
    return found | extra


def _call(function, tensors, heads, dropout_p=0.0, add_zero_attn=False, **options):
    """The function of its arguments by name."""
    given = dict(tensors)
    width = given["query"].shape[-1]
    first = [given.pop(name) for name in TENSORS[:3]]
    projections = [given.pop(n, None) for n in ("in_proj_weight", "in_proj_bias")]
    biases = [given.pop(n, None) for n in ("bias_k", "bias_v")]
    out = [given.pop(n, None) for n in ("out_proj_weight", "out_proj_bias")]
    if given.get("q_proj_weight") is not None:
        options["use_separate_proj_weight"] = True
    args = (*first, width, heads, *projections, *biases, add_zero_attn, dropout_p, *out)
    return function(*args, **given, **options)


def _function(function, names, heads, **options):
    """The function of the tensors in the order of `names`, all of which may have gradients."""

    def call(*tensors):
        return _call(function, dict(zip(names, tensors, strict=True)), heads, **options)

    return call


def _kernel(*args, **options):
    return U.multi_head_attention_forward(*args, **options, implementation="kernel")


def _reference(*args, **options):
    return U.multi_head_attention_forward(*args, **options, implementation="reference")


def _compare(tensors, sizes, ours=_kernel, gradients=True, **options):
    """Ours against PyTorch's function in float64, values and all gradients."""
    n, length, keys, e, h = sizes
    names = [name for name in TENSORS if tensors.get(name) is not None]
    theirs = _function(F.multi_head_attention_forward, names, h, **options)
    return testing.compare(
        _function(ours, names, h, **options),
        theirs,
        [theirs],
        [tensors[name] for name in names],
        gradients=gradients,
        reduction=2 * e + n * max(length, keys),
    )


def _sizes(backend):
    return [SMALL] if backend.small else [SMALL, LARGE]


def _padding(sizes, kind, dtype=torch.float32, device="cpu"):
    """The last keys of every other sample hidden, or a float added."""
    n, _, keys, *_ = sizes
    if kind == "float":
        return testing.make((n, keys), dtype, device=device, seed=20)
    hidden = torch.arange(keys) >= keys - 3
    hidden = hidden & (torch.arange(n) % 2 == 0)[:, None]
    if kind == "infinite":
        return torch.zeros(n, keys, dtype=dtype).masked_fill(hidden, -math.inf).to(device)
    return hidden.to(device)


def _mask(sizes, kind, dtype=torch.float32, device="cpu"):
    """A mask of [L, S] or [N H, L, S]; every query sees the first key."""
    n, length, keys, _, h = sizes
    shape = (n * h, length, keys) if kind.endswith("3") else (length, keys)
    x = testing.make(shape, dtype, device=device, seed=21)
    if kind.startswith("float"):
        return x
    hidden = x > 0.3
    hidden[..., 0] = False
    return hidden


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_values_and_gradients(every_backend, dtype, need_weights):
    for sizes in _sizes(every_backend):
        tensors = _tensors(sizes, dtype, every_backend.device)
        _compare(tensors, sizes, need_weights=need_weights)


@pytest.mark.parametrize("inputs", ["self", "memory"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_one_tensor_as_several_arguments(backend, dtype, inputs, need_weights):
    """One projection serves where PyTorch's has one."""
    sizes = SMALL if backend.small else LARGE
    n, length, keys, e, h = sizes
    tensors = _tensors(sizes, dtype, backend.device)
    names = TENSORS[3:7]

    def call(function):
        def run(x, y, *rest):
            y = x if inputs == "self" else y
            given = dict(zip(names, rest, strict=True)) | dict(query=x, key=y, value=y)
            return _call(function, given, h, need_weights=need_weights)

        return run

    theirs = call(F.multi_head_attention_forward)
    values = [tensors["query"], tensors["key"], *(tensors[name] for name in names)]
    testing.compare(call(_kernel), theirs, [theirs], values, reduction=2 * e + n * keys)


@pytest.mark.parametrize("attn_mask", ["none", "bool", "bool3", "float", "float3"])
@pytest.mark.parametrize("padding", ["none", "bool", "float", "infinite"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(backend, padding, attn_mask):
    for sizes in _sizes(backend):
        tensors = _tensors(sizes, device=backend.device)
        if padding != "none":
            tensors["key_padding_mask"] = _padding(sizes, padding, device=backend.device)
        if attn_mask != "none":
            tensors["attn_mask"] = _mask(sizes, attn_mask, device=backend.device)
        for need_weights, average in ((False, True), (True, True), (True, False)):
            _compare(tensors, sizes, need_weights=need_weights, average_attn_weights=average)


def test_masks_of_every_type(backend, dtype):
    sizes = _sizes(backend)[-1]
    tensors = _tensors(sizes, dtype, backend.device)
    tensors["key_padding_mask"] = _padding(sizes, "float", dtype, backend.device)
    tensors["attn_mask"] = _mask(sizes, "float3", dtype, backend.device)
    for need_weights in (False, True):
        _compare(tensors, sizes, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("more", ["bias", "zero", "both"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_keys_behind_the_others(backend, dtype, more, need_weights):
    sizes = SMALL
    tensors = _tensors(sizes, dtype, backend.device)
    if more != "zero":
        for seed, name in enumerate(("bias_k", "bias_v")):
            tensors[name] = testing.make((1, 1, 16), dtype, device=backend.device, seed=30 + seed)
    for padding, attn_mask in ((None, None), ("bool", "bool"), ("float", "bool3"), ("bool", None)):
        if padding is not None:
            tensors["key_padding_mask"] = _padding(sizes, padding, dtype, backend.device)
        if attn_mask is not None:
            tensors["attn_mask"] = _mask(sizes, attn_mask, dtype, backend.device)
        _compare(tensors, sizes, need_weights=need_weights, add_zero_attn=more != "bias")


@pytest.mark.parametrize("which", ["static_k", "static_v", "both"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_static_keys_and_values(backend, which, need_weights):
    n, length, keys, e, h = sizes = SMALL
    tensors = _tensors(sizes, device=backend.device)
    for length_of in (keys, keys + 2) if which == "both" else (keys,):
        for seed, name in enumerate(("static_k", "static_v")):
            if which in (name, "both"):
                shape = (n * h, length_of, e // h)
                tensors[name] = testing.make(shape, device=backend.device, seed=40 + seed)
        _compare(tensors, sizes, need_weights=need_weights, add_zero_attn=True)
        tensors["key_padding_mask"] = _padding((n, length, length_of, e, h), "bool").to(
            backend.device
        )
        _compare(tensors, sizes, need_weights=need_weights)
        del tensors["key_padding_mask"]


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_separate_weights(backend, dtype, need_weights):
    n, length, keys, e, h = sizes = SMALL
    tensors = _tensors(sizes, dtype, backend.device, in_proj_weight=None)
    for seed, (name, width) in enumerate((("query", e), ("key", 9), ("value", 11))):
        weight = testing.make((e, width), dtype, device=backend.device, seed=50 + seed)
        tensors[f"{name[0]}_proj_weight"] = weight * width**-0.5
        rows = length if name == "query" else keys
        tensors[name] = testing.make((rows, n, width), dtype, device=backend.device, seed=60 + seed)
    for bias in (tensors["in_proj_bias"], None):
        tensors["in_proj_bias"] = bias
        _compare(tensors, sizes, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_without_biases(backend, need_weights):
    tensors = _tensors(SMALL, device=backend.device, in_proj_bias=None, out_proj_bias=None)
    _compare(tensors, SMALL, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("average", [False, True], ids=["heads", "average"])
def test_one_sample(backend, need_weights, average):
    sizes = (1, *SMALL[1:])
    tensors = _tensors(sizes, device=backend.device)
    for name in TENSORS[:3]:
        tensors[name] = tensors[name].squeeze(1)
    options = dict(need_weights=need_weights, average_attn_weights=average)
    _compare(tensors, sizes, **options)
    tensors["key_padding_mask"] = _padding(sizes, "bool", device=backend.device).squeeze(0)
    for kind in ("bool", "bool3", "float3"):
        tensors["attn_mask"] = _mask(sizes, kind, device=backend.device)
        if kind == "float3":
            tensors["key_padding_mask"] = None
        _compare(tensors, sizes, **options)


@pytest.mark.parametrize("keys", [4, 5, 9])
def test_is_causal(backend, keys):
    """A hint: the mask is read only where there is padding or the weights are asked for."""
    sizes = (2, 5, keys, 16, 4)
    tensors = _tensors(sizes, device=backend.device)
    tensors["attn_mask"] = torch.ones(5, keys, device=backend.device).triu(1) > 0
    for more in ({}, dict(add_zero_attn=True), dict(need_weights=True)):
        _compare(tensors, sizes, **(dict(need_weights=False, is_causal=True) | more))
    tensors["attn_mask"] = _mask(sizes, "bool", device=backend.device)
    _compare(tensors, sizes, need_weights=False, is_causal=True)
    tensors["key_padding_mask"] = _padding(sizes, "bool", device=backend.device)
    _compare(tensors, sizes, need_weights=False, is_causal=True)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_no_key_are_pytorchs(backend, kind):
    """Zeros before the last projection without the weights, NaN with them."""
    tensors = _tensors(SMALL, device=backend.device)
    mask = _mask(SMALL, "bool", device=backend.device)
    mask[2] = True
    padding = _padding(SMALL, "bool", device=backend.device)
    padding[1] = True
    if kind == "float":
        mask, padding = (
            torch.zeros_like(m, dtype=torch.float32).masked_fill(m, -math.inf)
            for m in (mask, padding)
        )
    for given in (dict(attn_mask=mask), dict(key_padding_mask=padding)):
        found = _compare(tensors | given, SMALL, need_weights=False)
        assert all(g is None or g.isfinite().all() for g in found.gradients)
        out, weights = _compare(
            tensors | given, SMALL, need_weights=True, gradients=False
        ).outputs
        assert out.isnan().any() and weights.isnan().any()
        assert not (out.isnan().all() or weights.isnan().all())


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("kind", ["bool", "infinite"])
@pytest.mark.parametrize("ours", [_kernel, _reference], ids=["kernel", "reference"])
def test_padded_keys_leave_no_trace(backend, ours, kind, need_weights):
    """NaN in keys and values that are padding: the same bits as zeros there."""
    sizes = SMALL if backend.small else LARGE
    padding = _padding(sizes, kind, device=backend.device)
    hidden = _padding(sizes, "bool", device=backend.device).t()[..., None]
    names = list(TENSORS[:7])
    function = _function(
        ours, names, sizes[-1], key_padding_mask=padding, need_weights=need_weights
    )
    results = []
    for filler in (0.0, math.nan):
        tensors = _tensors(sizes, device=backend.device)
        for name in ("key", "value"):
            tensors[name] = tensors[name].masked_fill(hidden, filler)
        found = testing.run(function, [tensors[name] for name in names])
        results.append(found.outputs + found.gradients)
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty) and dirty.isfinite().all()


def test_padding_of_self_attention_leaves_no_trace_in_other_rows(backend):
    """A padded position is a query as well; the others do not see it."""
    x, *rest = (_tensors(SMALL, device=backend.device)[n] for n in ("query", *TENSORS[3:7]))
    padding = torch.zeros(2, 5, dtype=torch.bool, device=backend.device)
    padding[0, 3:] = True
    results = []
    for filler in (0.0, math.nan):
        x = x.masked_fill(padding.t()[..., None], filler)
        for need_weights in (False, True):
            given = dict(zip(TENSORS[3:7], rest, strict=True)) | dict(query=x, key=x, value=x)
            options = dict(key_padding_mask=padding, need_weights=need_weights)
            results.append(_call(_kernel, given, 4, **options)[0][~padding.t()])
    clean, clean_too, dirty, dirty_too = results
    assert torch.equal(clean, dirty) and torch.equal(clean_too, dirty_too)
    assert dirty.isfinite().all() and dirty_too.isfinite().all()


def test_nothing_of_the_scores_size_is_kept():
    """With both masks, forward and backward keep less than one matrix of scores a head."""
    n, length, e, h = 2, 512, 16, 8
    tensors = _tensors((n, length, length, e, h))
    tensors["key_padding_mask"] = _padding((n, length, length, e, h), "bool")
    tensors["attn_mask"] = torch.ones(length, length).triu(1) > 0
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    leaves = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _call(_kernel, leaves, h, need_weights=False)
    stored = max(sizes)
    assert stored <= n * h * length * length  # expanded views count whole
    with torch.profiler.profile(profile_memory=True) as profiler:
        _call(_kernel, leaves, h, need_weights=False)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert 0 < largest < n * length * length * 4


@pytest.mark.parametrize("kind", ["float", "float3"])
def test_float_mask_beside_narrow_queries(backend, kind):
    tensors = _tensors(SMALL, torch.bfloat16, backend.device)
    if backend.small:
        tensors = _tensors(SMALL, torch.float16, backend.device)
    tensors["attn_mask"] = _mask(SMALL, kind, device=backend.device)
    _compare(tensors, SMALL, need_weights=False)


@pytest.mark.parametrize("ours", [_kernel, _reference], ids=["kernel", "reference"])
def test_batch_first_in_memory_stays_so(backend, ours):
    tensors = _tensors(SMALL, device=backend.device)
    for name in TENSORS[:3]:
        tensors[name] = testing.make(
            tensors[name].transpose(0, 1).shape, device=backend.device, seed=70
        ).transpose(0, 1)
    out = _compare(tensors, SMALL, ours, need_weights=False).outputs[0]
    assert out.transpose(0, 1).is_contiguous()
    out = _compare(_tensors(SMALL, device=backend.device), SMALL, ours).outputs[0]
    assert out.is_contiguous()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, layout):
    sizes = SMALL if backend.small else LARGE
    tensors = _tensors(sizes, device=backend.device)
    tensors["attn_mask"] = _mask(sizes, "float3", device=backend.device)
    tensors = {name: testing.lay_out(x, layout) for name, x in tensors.items()}
    for need_weights in (False, True):
        _compare(tensors, sizes, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_reference_is_pytorchs(dtype_any, need_weights):
    tensors = _tensors(SMALL, dtype_any)
    tensors["key_padding_mask"] = _padding(SMALL, "bool")
    tensors["attn_mask"] = _mask(SMALL, "bool3")
    _compare(tensors, SMALL, _reference, need_weights=need_weights)


def _seeded(function):
    def call(*args, **options):
        torch.manual_seed(11)
        return function(*args, **options)

    return call


def test_dropout_without_weights_is_the_formulas(backend):
    n, length, keys, e, h = SMALL
    tensors = _tensors(SMALL, device=backend.device)
    names = list(TENSORS[:7])
    options = dict(dropout_p=0.4, need_weights=False, key_padding_mask=_padding(SMALL, "bool"))
    options["key_padding_mask"] = options["key_padding_mask"].to(backend.device)
    oracle = _function(_seeded(_reference), names, h, **options)
    kernel = _function(_seeded(_kernel), names, h, **options)
    values = [tensors[name] for name in names]
    found = testing.compare(kernel, oracle, [], values, reduction=2 * e + n * keys)
    plain = testing.run(_function(_kernel, names, h, need_weights=False), values)
    assert not torch.equal(found.outputs[0], plain.outputs[0])
    still = testing.run(
        _function(_kernel, names, h, need_weights=False, dropout_p=0.4, training=False), values
    )
    assert torch.equal(still.outputs[0], plain.outputs[0])
    out, _ = _call(_kernel, tensors, h, dropout_p=1.0, need_weights=False)
    assert torch.equal(out, tensors["out_proj_bias"].expand_as(out))


@pytest.mark.parametrize("average", [False, True], ids=["heads", "average"])
def test_dropout_beside_weights_is_pytorchs(average):
    """The same numbers of the same generator: the same weights are dropped."""
    tensors = _tensors(SMALL, torch.float64)
    tensors["key_padding_mask"] = _padding(SMALL, "bool")
    tensors |= {name: testing.make((1, 1, 16), torch.float64) for name in ("bias_k", "bias_v")}
    names = [name for name in TENSORS if tensors.get(name) is not None]
    options = dict(dropout_p=0.4, average_attn_weights=average)
    theirs = _function(_seeded(F.multi_head_attention_forward), names, 4, **options)
    ours = _function(_seeded(U.multi_head_attention_forward), names, 4, **options)
    found = testing.compare(ours, theirs, [], [tensors[n] for n in names], reduction=46)
    assert average or (found.outputs[1] == 0).any()
    (choice,) = udlkernels.explain(ours, *(tensors[name] for name in names)).choices
    assert choice.implementation == "reference"
    with pytest.raises(udlkernels.ArgumentError, match="weights after dropout"):
        _call(_kernel, tensors, 4, **options)


def test_gradcheck_on_the_kernel():
    sizes = (1, 2, 3, 4, 2)
    tensors = _tensors(sizes, torch.float64)
    tensors["attn_mask"] = _mask(sizes, "float3", torch.float64)
    names = list(tensors)
    leaves = [x.requires_grad_() for x in tensors.values()]
    for need_weights in (False, True):
        function = _function(_kernel, names, 2, need_weights=need_weights)

        def outputs(*given, function=function):
            return tuple(x for x in function(*given) if x is not None)

        assert torch.autograd.gradcheck(outputs, leaves)
        assert torch.autograd.gradgradcheck(outputs, leaves)


def test_gradients_only_where_wanted(backend):
    tensors = _tensors(SMALL, device=backend.device)
    tensors["attn_mask"] = _mask(SMALL, "float", device=backend.device)
    names = list(tensors)
    function = _function(_kernel, names, 4, need_weights=False)
    whole = testing.run(function, list(tensors.values())).gradients
    for i in range(len(names)):
        some = [t.detach().requires_grad_(i == n) for n, t in enumerate(tensors.values())]
        out, _ = function(*some)
        (found,) = torch.autograd.grad(out, some[i], *testing.make_cotangents([out]))
        assert torch.equal(found, whole[i])


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    names = [*TENSORS[:7], "key_padding_mask", "attn_mask"]
    sets = []
    for n in (3, 5):
        sizes = (n, n + 2, n + 4, 16, 4)
        tensors = _tensors(sizes)
        tensors |= dict(key_padding_mask=_padding(sizes, "bool"), attn_mask=_mask(sizes, "float"))
        sets.append([tensors[name] for name in names])
    function = _function(_kernel, names, 4, need_weights=False)
    assert_compiles(function, sets, OPS, name, shapes == "dynamic")
    if compiler == "aot_eager-static":
        weights = _function(_kernel, names, 4)
        assert_compiles(weights, sets[:1], OPS, name)
        dropped = _function(_kernel, names, 4, dropout_p=0.2, need_weights=False)
        assert_compiles(dropped, sets[:1], OPS, name)


def test_same_bits_at_any_thread_count():
    tensors = _tensors(LARGE)
    tensors["attn_mask"] = _mask(LARGE, "float")
    function = _function(_heads_alone, list(tensors), LARGE[-1], need_weights=False)
    assert_deterministic(function, list(tensors.values()))


def _heads_alone(*args, **options):
    """The gradients of what our kernels compute; the projections are PyTorch's."""
    args = [a.detach() if i in (5, 6, 11, 12) else a for i, a in enumerate(args)]
    return _kernel(*args, **options)


def test_samples_do_not_depend_on_each_other():
    """The attention's; PyTorch's products may depend on what stands beside a row."""
    e, h = 4, 2
    eye = torch.eye(e)
    static = [testing.make((6 * h, 9, e // h), seed=s) for s in (1, 2)]

    def call(q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        rest = (eye.repeat(3, 1), None, None, None, False, 0.0, eye, None)
        return _kernel(q, k, v, e, h, *rest, need_weights=False)[0].transpose(0, 1)

    assert all(x.shape[0] == 12 for x in static)
    inputs = [testing.make((6, rows, e), seed=s) for s, rows in enumerate((5, 9, 9))]
    assert_rows_independent(call, inputs, (0, 1, 2))


def test_autocast():
    tensors = _tensors(SMALL)
    padding = _padding(SMALL, "bool")
    for need_weights in (False, True):
        options = dict(key_padding_mask=padding, need_weights=need_weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = _call(_kernel, tensors, 4, **options)
            theirs = _call(F.multi_head_attention_forward, tensors, 4, **options)
        exact = _call(F.multi_head_attention_forward, _wide(tensors), 4, **options)
        for found, peer, oracle in zip(ours, theirs, exact, strict=True):
            assert (found is None) == (peer is None)
            if found is not None:
                assert found.dtype == peer.dtype
                testing.check(found.bfloat16(), oracle, [peer.bfloat16()], reduction=16)


def _wide(tensors):
    return {name: x.double() for name, x in tensors.items()}


def test_transforms():
    tensors = _tensors(SMALL)
    names = list(tensors)
    function = _function(U.multi_head_attention_forward, names, 4, need_weights=False)
    stacked = torch.stack([tensors["query"], tensors["query"] + 1])
    rest = list(tensors.values())[1:]
    found = torch.func.vmap(lambda q: function(q, *rest)[0])(stacked)
    one = [function(q, *rest)[0] for q in stacked]
    for ours, theirs in zip(found, one, strict=True):
        testing.check(ours, theirs.double(), [theirs], reduction=46)
    gradient = torch.func.grad(lambda q: function(q, *rest)[0].sum())(tensors["query"])
    leaf = tensors["query"].requires_grad_()
    (wanted,) = torch.autograd.grad(function(leaf, *rest)[0].sum(), leaf)
    testing.check(gradient, wanted.double(), [wanted], reduction=46)


def test_choice():
    tensors = _tensors(SMALL)

    def chosen(changes=None, **options):
        options = dict(need_weights=False) | options
        call = lambda: _call(  # noqa: E731
            U.multi_head_attention_forward, tensors | (changes or {}), 4, **options
        )
        return [(c.op, c.implementation) for c in udlkernels.explain(call).choices]

    op = "multi_head_attention_forward"
    assert chosen() == [(op, "kernel"), ("attention", "kernel")]
    assert chosen(need_weights=True) == [(op, "kernel"), ("attention", "kernel")]
    assert chosen(implementation="reference") == [(op, "reference")]
    assert chosen(implementation="torch") == [(op, "torch")]
    complex_ = {name: x.to(torch.complex64) for name, x in tensors.items()}
    with pytest.raises(Exception) as theirs:
        _call(F.multi_head_attention_forward, complex_, 4, need_weights=False)
    with pytest.raises(type(theirs.value)):
        chosen(complex_)
    empty = dict(query=tensors["query"][:0])
    assert chosen(empty) == [(op, "torch")]
    with pytest.raises(udlkernels.ArgumentError, match="no elements"):
        chosen(empty, implementation="kernel")
    wide = _tensors((1, 2, 2, 600, 1))
    assert chosen(wide | {"key": wide["key"]}) if False else True
    call = lambda: _call(U.multi_head_attention_forward, wide, 1, need_weights=False)  # noqa: E731
    assert udlkernels.explain(call).choices[0].implementation == "torch"
    with pytest.raises(udlkernels.ArgumentError, match="implementation: expected one of"):
        chosen(implementation="fast")


BAD = {
    "rank": lambda t: dict(query=t["query"][0, 0]),
    "ranks": lambda t: dict(key=t["key"][:, 0]),
    "batch": lambda t: dict(key=t["key"][:, :1], value=t["value"][:, :1]),
    "lengths": lambda t: dict(value=t["value"][:4]),
    "width": lambda t: dict(key=t["key"][..., :9], value=t["value"][..., :9]),
    "packed weight": lambda t: dict(in_proj_weight=t["in_proj_weight"][:40]),
    "no weight": lambda t: dict(in_proj_weight=None),
    "packed bias": lambda t: dict(in_proj_bias=t["in_proj_bias"][:9]),
    "out weight": lambda t: dict(out_proj_weight=t["out_proj_weight"][:, :9]),
    "types": lambda t: dict(out_proj_weight=t["out_proj_weight"].double()),
    "integers": lambda t: {name: x.int() for name, x in t.items()},
    "padding shape": lambda t: dict(key_padding_mask=torch.zeros(2, 6) > 0),
    "padding rank": lambda t: dict(key_padding_mask=torch.zeros(7) > 0),
    "padding type": lambda t: dict(key_padding_mask=torch.zeros(2, 7).int()),
    "mask shape": lambda t: dict(attn_mask=torch.zeros(5, 6) > 0),
    "mask heads": lambda t: dict(attn_mask=torch.zeros(7, 5, 7) > 0),
    "mask rank": lambda t: dict(attn_mask=torch.zeros(2, 4, 5, 7) > 0),
    "mask type": lambda t: dict(attn_mask=torch.zeros(5, 7).int()),
    "one bias": lambda t: dict(bias_k=torch.zeros(1, 1, 16)),
    "bias and static": lambda t: dict(
        bias_k=torch.zeros(1, 1, 16), bias_v=torch.zeros(1, 1, 16), static_k=torch.zeros(8, 7, 4)
    ),
    "static heads": lambda t: dict(static_k=torch.zeros(7, 7, 4)),
    "static width": lambda t: dict(static_v=torch.zeros(8, 7, 5)),
    "separate": lambda t: dict(q_proj_weight=torch.zeros(16, 9)),
}
BAD_OPTIONS = {
    "heads": dict(heads=3),
    "causal": dict(is_causal=True),
    "dropout": dict(dropout_p=1.5),
}


@pytest.mark.parametrize(
    ("case", "need_weights"), itertools.product([*BAD, *BAD_OPTIONS], [False, True])
)
def test_bad_input_gives_torchs_own_answer(case, need_weights):
    tensors = _tensors(SMALL)
    tensors |= BAD[case](tensors) if case in BAD else {}
    options = dict(heads=4, need_weights=need_weights) | BAD_OPTIONS.get(case, {})
    heads = options.pop("heads")
    with pytest.raises(Exception) as theirs:
        _call(F.multi_head_attention_forward, tensors, heads, **options)
    for implementation in ("auto", "torch"):
        with pytest.raises(Exception) as ours:
            more = dict(implementation=implementation)
            _call(U.multi_head_attention_forward, tensors, heads, **options, **more)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
    with pytest.raises(udlkernels.ArgumentError, match="which cannot"):
        _call(_kernel, tensors, heads, **options)


@pytest.mark.parametrize("kind", ["embed_dim", "subclass"])
def test_what_only_pytorch_takes(kind):
    tensors = _tensors(SMALL)
    if kind == "subclass":

        class Mine(torch.Tensor):
            pass

        tensors["query"] = tensors["query"].as_subclass(Mine)
        out, _ = _call(U.multi_head_attention_forward, tensors, 4, need_weights=False)
        assert type(out) is Mine
        return
    args = [tensors[name] for name in TENSORS[:3]]
    rest = (*(tensors[n] for n in TENSORS[3:5]), None, None, False, 0.0)
    with pytest.raises(AssertionError, match="expecting embedding dimension"):
        U.multi_head_attention_forward(*args, 15, 4, *rest, tensors["out_proj_weight"], None)
