"""multi_head_attention_forward: values and gradients of every option against PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.attention.multi_head import (
    LARGE,
    SMALL,
    TENSORS,
    by_tensors,
    call_with,
    compare,
    formula,
    kernel,
    make_mask,
    make_padding,
    make_tensors,
    sizes_for,
    terms,
    widened,
)
from udlkernels import functional as U
from udlkernels import testing


def test_defaults_are_pytorchs():
    tensors = make_tensors(SMALL)
    args = [tensors[name] for name in TENSORS[:3]]
    args += [16, 4, *(tensors[name] for name in TENSORS[3:5]), None, None, False, 0.0]
    args += [tensors[name] for name in TENSORS[5:7]]
    found, wanted = U.multi_head_attention_forward(*args), F.multi_head_attention_forward(*args)
    for ours, theirs in zip(found, wanted, strict=True):
        testing.check(ours, theirs.double(), [theirs], reduction=terms(SMALL))


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_values_and_gradients(every_backend, dtype, need_weights):
    for sizes in sizes_for(every_backend):
        tensors = make_tensors(sizes, dtype, every_backend.device)
        compare(tensors, sizes, need_weights=need_weights)


@pytest.mark.parametrize("inputs", ["self", "memory"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_one_tensor_as_several_arguments(backend, dtype, inputs, need_weights):
    """One projection serves where PyTorch's has one."""
    sizes = SMALL if backend.small else LARGE
    h = sizes[-1]
    tensors = make_tensors(sizes, dtype, backend.device)
    names = TENSORS[3:7]

    def call(function):
        def run(x, y, *rest):
            y = x if inputs == "self" else y
            given = dict(zip(names, rest, strict=True)) | dict(query=x, key=y, value=y)
            return call_with(function, given, h, need_weights=need_weights)

        return run

    theirs = call(F.multi_head_attention_forward)
    values = [tensors["query"], tensors["key"], *(tensors[name] for name in names)]
    testing.compare(call(kernel), theirs, [theirs], values, reduction=terms(sizes))


@pytest.mark.parametrize("attn_mask", ["none", "bool", "bool3", "float", "float3"])
@pytest.mark.parametrize("padding", ["none", "bool", "float", "infinite"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(backend, padding, attn_mask):
    for sizes in sizes_for(backend):
        tensors = make_tensors(sizes, device=backend.device)
        if padding != "none":
            tensors["key_padding_mask"] = make_padding(sizes, padding, device=backend.device)
        if attn_mask != "none":
            tensors["attn_mask"] = make_mask(sizes, attn_mask, device=backend.device)
        for need_weights, average in ((False, True), (True, True), (True, False)):
            compare(tensors, sizes, need_weights=need_weights, average_attn_weights=average)


def test_masks_of_every_type(backend, dtype):
    sizes = sizes_for(backend)[-1]
    tensors = make_tensors(sizes, dtype, backend.device)
    tensors["key_padding_mask"] = make_padding(sizes, "float", dtype, backend.device)
    tensors["attn_mask"] = make_mask(sizes, "float3", dtype, backend.device)
    for need_weights in (False, True):
        compare(tensors, sizes, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("more", ["bias", "zero", "both"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_keys_behind_the_others(backend, more, need_weights):
    sizes, dtype = SMALL, torch.float32
    tensors = make_tensors(sizes, dtype, backend.device)
    if more != "zero":
        for seed, name in enumerate(("bias_k", "bias_v")):
            tensors[name] = testing.make((1, 1, 16), dtype, device=backend.device, seed=30 + seed)
    for padding, attn_mask in ((None, None), ("bool", "bool"), ("float", "bool3"), ("bool", None)):
        if padding is not None:
            tensors["key_padding_mask"] = make_padding(sizes, padding, dtype, backend.device)
        if attn_mask is not None:
            tensors["attn_mask"] = make_mask(sizes, attn_mask, dtype, backend.device)
        compare(tensors, sizes, need_weights=need_weights, add_zero_attn=more != "bias")


@pytest.mark.parametrize("which", ["static_k", "static_v", "both"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_static_keys_and_values(backend, which, need_weights):
    n, length, keys, e, h = sizes = SMALL
    tensors = make_tensors(sizes, device=backend.device)
    for length_of in (keys, keys + 2) if which == "both" else (keys,):
        for seed, name in enumerate(("static_k", "static_v")):
            if which in (name, "both"):
                shape = (n * h, length_of, e // h)
                tensors[name] = testing.make(shape, device=backend.device, seed=40 + seed)
        compare(tensors, sizes, need_weights=need_weights, add_zero_attn=True)
        tensors["key_padding_mask"] = make_padding((n, length, length_of, e, h), "bool").to(
            backend.device
        )
        compare(tensors, sizes, need_weights=need_weights)
        del tensors["key_padding_mask"]


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_separate_weights(backend, dtype, need_weights):
    n, length, keys, e, _ = sizes = SMALL
    tensors = make_tensors(sizes, dtype, backend.device, in_proj_weight=None)
    for seed, (name, width) in enumerate((("query", e), ("key", 9), ("value", 11))):
        weight = testing.make((e, width), dtype, device=backend.device, seed=50 + seed)
        tensors[f"{name[0]}_proj_weight"] = weight * width**-0.5
        rows = length if name == "query" else keys
        tensors[name] = testing.make((rows, n, width), dtype, device=backend.device, seed=60 + seed)
    for bias in (tensors["in_proj_bias"], None):
        tensors["in_proj_bias"] = bias
        compare(tensors, sizes, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_without_biases(backend, need_weights):
    tensors = make_tensors(SMALL, device=backend.device, in_proj_bias=None, out_proj_bias=None)
    compare(tensors, SMALL, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("average", [False, True], ids=["heads", "average"])
def test_one_sample(backend, need_weights, average):
    sizes = (1, *SMALL[1:])
    tensors = make_tensors(sizes, device=backend.device)
    for name in TENSORS[:3]:
        tensors[name] = tensors[name].squeeze(1)
    options = dict(need_weights=need_weights, average_attn_weights=average)
    compare(tensors, sizes, **options)
    tensors["key_padding_mask"] = make_padding(sizes, "bool", device=backend.device).squeeze(0)
    for kind in ("bool", "bool3", "float3"):
        tensors["attn_mask"] = make_mask(sizes, kind, device=backend.device)
        if kind == "float3":
            tensors["key_padding_mask"] = None
        compare(tensors, sizes, **options)


@pytest.mark.parametrize("keys", [4, 5, 9])
def test_is_causal(backend, keys):
    """A hint: the mask is read only where there is padding or the weights are asked for."""
    sizes = (2, 5, keys, 16, 4)
    tensors = make_tensors(sizes, device=backend.device)
    tensors["attn_mask"] = torch.ones(5, keys, device=backend.device).triu(1) > 0
    for more in ({}, dict(add_zero_attn=True), dict(need_weights=True)):
        compare(tensors, sizes, **(dict(need_weights=False, is_causal=True) | more))
    tensors["attn_mask"] = make_mask(sizes, "bool", device=backend.device)
    compare(tensors, sizes, need_weights=False, is_causal=True)
    tensors["key_padding_mask"] = make_padding(sizes, "bool", device=backend.device)
    compare(tensors, sizes, need_weights=False, is_causal=True)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_see_no_key_are_pytorchs(backend, kind):
    """Zeros before the last projection without the weights, NaN with them."""
    tensors = make_tensors(SMALL, device=backend.device)
    mask = make_mask(SMALL, "bool", device=backend.device)
    mask[2] = True
    padding = make_padding(SMALL, "bool", device=backend.device)
    padding[1] = True
    if kind == "float":
        mask, padding = (
            torch.zeros_like(m, dtype=torch.float32).masked_fill(m, -math.inf)
            for m in (mask, padding)
        )
    for given in (dict(attn_mask=mask), dict(key_padding_mask=padding)):
        found = compare(tensors | given, SMALL, need_weights=False)
        assert all(g is None or g.isfinite().all() for g in found.gradients)
        out, weights = compare(tensors | given, SMALL, need_weights=True, gradients=False).outputs
        assert out.isnan().any() and weights.isnan().any()
        assert not (out.isnan().all() or weights.isnan().all())


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("kind", ["bool", "infinite"])
@pytest.mark.parametrize("ours", [kernel, formula], ids=["kernel", "reference"])
def test_padded_keys_leave_no_trace(backend, ours, kind, need_weights):
    """NaN in keys and values that are padding: the same bits as zeros there."""
    sizes = SMALL if backend.small else LARGE
    padding = make_padding(sizes, kind, device=backend.device)
    hidden = make_padding(sizes, "bool", device=backend.device).t()[..., None]
    names = list(TENSORS[:7])
    function = by_tensors(
        ours, names, sizes[-1], key_padding_mask=padding, need_weights=need_weights
    )
    results = []
    for filler in (0.0, math.nan):
        tensors = make_tensors(sizes, device=backend.device)
        for name in ("key", "value"):
            tensors[name] = tensors[name].masked_fill(hidden, filler)
        found = testing.run(function, [tensors[name] for name in names])
        results.append(found.outputs + found.gradients)
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty) and dirty.isfinite().all()


def test_padding_of_self_attention_leaves_no_trace_in_other_rows(backend):
    """A padded position is a query as well; the others do not see it."""
    x, *rest = (make_tensors(SMALL, device=backend.device)[n] for n in ("query", *TENSORS[3:7]))
    padding = torch.zeros(2, 5, dtype=torch.bool, device=backend.device)
    padding[0, 3:] = True
    results = []
    for filler in (0.0, math.nan):
        x = x.masked_fill(padding.t()[..., None], filler)
        given = dict(zip(TENSORS[3:7], rest, strict=True)) | dict(query=x, key=x, value=x)
        for need_weights, dropout_p in ((False, 0.0), (True, 0.0), (True, 0.5)):
            torch.manual_seed(3)
            out, _ = call_with(
                U.multi_head_attention_forward, given, 4, dropout_p, key_padding_mask=padding,
                need_weights=need_weights,
            )  # fmt: skip
            results.append(out[~padding.t()])
    for clean, dirty in zip(results[:3], results[3:], strict=True):
        assert torch.equal(clean, dirty) and dirty.isfinite().all()


def test_nothing_of_the_scores_size_is_made():
    """With both masks, not one matrix of scores for each sample: neither allocated nor kept."""
    n, length, e, h = 2, 512, 16, 8
    sizes = (n, length, length, e, h)
    tensors = {name: x.requires_grad_() for name, x in make_tensors(sizes).items()}
    tensors["key_padding_mask"] = make_padding(sizes, "bool")
    tensors["attn_mask"] = torch.ones(length, length).triu(1) > 0
    kept = []

    def pack(x):
        kept.append(x.untyped_storage().nbytes())
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.profiler.profile(profile_memory=True) as profiler,
    ):
        out, _ = call_with(kernel, tensors, h, need_weights=False)
        out.sum().backward()
    allocated = [event.cpu_memory_usage for event in profiler.events()]
    assert 0 < max(kept) < n * length * length * 4
    assert 0 < max(allocated) < n * length * length * 4


@pytest.mark.parametrize("kind", ["float", "float3"])
def test_float_mask_beside_narrow_queries(backend, kind):
    tensors = make_tensors(SMALL, torch.bfloat16, backend.device)
    if backend.small:
        tensors = make_tensors(SMALL, torch.float16, backend.device)
    tensors["attn_mask"] = make_mask(SMALL, kind, device=backend.device).requires_grad_()
    out, _ = call_with(kernel, tensors, 4, need_weights=False)
    exact, _ = call_with(F.multi_head_attention_forward, widened(tensors), 4, need_weights=False)
    peer, _ = call_with(F.multi_head_attention_forward, tensors, 4, need_weights=False)
    testing.check(out, exact, [peer], reduction=terms(SMALL))
    (found,) = torch.autograd.grad(out.sum(), tensors["attn_mask"])
    assert found.dtype == torch.float32 and found.shape == tensors["attn_mask"].shape


@pytest.mark.parametrize("ours", [kernel, formula], ids=["kernel", "reference"])
def test_batch_first_in_memory_stays_so(backend, ours):
    tensors = make_tensors(SMALL, device=backend.device)
    for name in TENSORS[:3]:
        tensors[name] = testing.make(
            tensors[name].transpose(0, 1).shape, device=backend.device, seed=70
        ).transpose(0, 1)
    out = compare(tensors, SMALL, ours, need_weights=False).outputs[0]
    assert out.transpose(0, 1).is_contiguous()
    out = compare(make_tensors(SMALL, device=backend.device), SMALL, ours).outputs[0]
    assert out.is_contiguous()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, layout):
    sizes = SMALL if backend.small else LARGE
    tensors = make_tensors(sizes, device=backend.device)
    tensors["attn_mask"] = make_mask(sizes, "float3", device=backend.device)
    tensors = {name: testing.lay_out(x, layout) for name, x in tensors.items()}
    # The gradients of scores that are equal for all keys are 0 but for rounding.
    gradients = layout != "expanded"
    for need_weights in (False, True):
        compare(tensors, sizes, gradients=gradients, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["plain", "weights"])
def test_reference_is_pytorchs(dtype_any, need_weights):
    tensors = make_tensors(SMALL, dtype_any)
    tensors["key_padding_mask"] = make_padding(SMALL, "bool")
    tensors["attn_mask"] = make_mask(SMALL, "bool3")
    compare(tensors, SMALL, formula, need_weights=need_weights)


def test_gradients_only_where_wanted(backend):
    tensors = make_tensors(SMALL, device=backend.device)
    tensors["attn_mask"] = make_mask(SMALL, "float", device=backend.device)
    names = list(tensors)
    function = by_tensors(kernel, names, 4, need_weights=False)
    whole = testing.run(function, list(tensors.values())).gradients
    for i in range(len(names)):
        some = [t.detach().requires_grad_(i == n) for n, t in enumerate(tensors.values())]
        out, _ = function(*some)
        (found,) = torch.autograd.grad(out, some[i], *testing.make_cotangents([out]))
        testing.check(found, whole[i].double(), [], reduction=terms(SMALL))
