"""multi_head_attention_forward: dropout, compilation, choice, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import udlkernels
from tests.attention.multi_head import (
    LARGE,
    OPS,
    SMALL,
    TENSORS,
    by_tensors,
    call_with,
    formula,
    kernel,
    make_mask,
    make_padding,
    make_tensors,
    terms,
    widened,
)
from tests.support import assert_compiles, assert_deterministic, assert_rows_independent
from udlkernels import functional as U
from udlkernels import testing


def _seeded(function):
    def call(*args, **options):
        torch.manual_seed(11)
        return function(*args, **options)

    return call


def test_dropout_without_weights_is_the_formulas(backend):
    h = SMALL[-1]
    tensors = make_tensors(SMALL, device=backend.device)
    names = list(TENSORS[:7])
    options = dict(dropout_p=0.4, need_weights=False, key_padding_mask=make_padding(SMALL, "bool"))
    options["key_padding_mask"] = options["key_padding_mask"].to(backend.device)
    oracle = by_tensors(_seeded(formula), names, h, **options)
    ours = by_tensors(_seeded(kernel), names, h, **options)
    values = [tensors[name] for name in names]
    found = testing.compare(ours, oracle, [], values, reduction=terms(SMALL))
    plain = testing.run(by_tensors(kernel, names, h, need_weights=False), values)
    assert not torch.equal(found.outputs[0], plain.outputs[0])
    still = testing.run(
        by_tensors(kernel, names, h, need_weights=False, dropout_p=0.4, training=False), values
    )
    assert torch.equal(still.outputs[0], plain.outputs[0])
    out, _ = call_with(kernel, tensors, h, dropout_p=1.0, need_weights=False)
    assert torch.equal(out, tensors["out_proj_bias"].expand_as(out))


@pytest.mark.parametrize("average", [False, True], ids=["heads", "average"])
def test_dropout_beside_weights_is_pytorchs(average):
    """The same numbers of the same generator: the same weights are dropped."""
    tensors = make_tensors(SMALL, torch.float64)
    tensors["key_padding_mask"] = make_padding(SMALL, "bool")
    tensors |= {name: testing.make((1, 1, 16), torch.float64) for name in ("bias_k", "bias_v")}
    names = [name for name in TENSORS if tensors.get(name) is not None]
    options = dict(dropout_p=0.4, average_attn_weights=average)
    theirs = by_tensors(_seeded(F.multi_head_attention_forward), names, 4, **options)
    ours = by_tensors(_seeded(U.multi_head_attention_forward), names, 4, **options)
    found = testing.compare(ours, theirs, [], [tensors[n] for n in names], reduction=terms(SMALL))
    assert average or (found.outputs[1] == 0).any()
    (choice,) = udlkernels.explain(ours, *(tensors[name] for name in names)).choices
    assert choice.implementation == "reference"
    with pytest.raises(udlkernels.ArgumentError, match="weights after dropout"):
        call_with(kernel, tensors, 4, **options)


def test_gradcheck_on_the_kernel():
    sizes = (1, 2, 3, 4, 2)
    tensors = make_tensors(sizes, torch.float64)
    tensors["attn_mask"] = make_mask(sizes, "float3", torch.float64)
    names = list(tensors)
    leaves = [x.requires_grad_() for x in tensors.values()]
    for need_weights in (True, False):
        function = by_tensors(kernel, names, 2, need_weights=need_weights)

        def outputs(*given, function=function):
            return tuple(x for x in function(*given) if x is not None)

        assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(lambda *given: function(*given)[0], leaves)


def _masked(n):
    sizes = (n, n + 2, n + 4, 16, 4)
    masks = dict(key_padding_mask=make_padding(sizes, "bool"), attn_mask=make_mask(sizes, "float"))
    return make_tensors(sizes) | masks


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic):
    names = list(_masked(3))
    sets = [list(_masked(n).values()) for n in (3, 5)]
    function = by_tensors(kernel, names, 4, need_weights=False)
    assert_compiles(function, sets, OPS, dynamic=dynamic)
    if not dynamic:
        assert_compiles(by_tensors(kernel, names, 4), sets[:1], OPS)
        dropped = by_tensors(kernel, names, 4, dropout_p=0.2, need_weights=False)
        assert_compiles(dropped, sets[:1], OPS)


def test_compiled_by_inductor():
    """Its products around the kernels are not eager's to the bit."""
    names = list(_masked(3))
    function = by_tensors(kernel, names, 4, need_weights=False)
    compiled = torch.compile(function, fullgraph=True)
    found, expected = (testing.run(f, list(_masked(3).values())) for f in (compiled, function))
    pairs = zip(found.outputs + found.gradients, expected.outputs + expected.gradients, strict=True)
    for ours, theirs in pairs:
        if theirs is not None:
            testing.check(ours, theirs.double(), [], reduction=terms(SMALL))


def test_same_bits_at_any_thread_count():
    tensors = make_tensors(LARGE)
    tensors["attn_mask"] = make_mask(LARGE, "float")
    function = by_tensors(_heads_alone, list(tensors), LARGE[-1], need_weights=False)
    assert_deterministic(function, list(tensors.values()))


def _heads_alone(*args, **options):
    """The gradients of what our kernels compute; the projections are PyTorch's."""
    args = [a.detach() if i in (5, 6, 11, 12) else a for i, a in enumerate(args)]
    return kernel(*args, **options)


def test_samples_do_not_depend_on_each_other():
    """The attention's; PyTorch's products may depend on what stands beside a row."""
    e, h = 4, 2
    eye = torch.eye(e)
    static = [testing.make((6 * h, 9, e // h), seed=s) for s in (1, 2)]

    def call(q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        rest = (eye.repeat(3, 1), None, None, None, False, 0.0, eye, None)
        return kernel(q, k, v, e, h, *rest, need_weights=False)[0].transpose(0, 1)

    assert all(x.shape[0] == 12 for x in static)
    inputs = [testing.make((6, rows, e), seed=s) for s, rows in enumerate((5, 9, 9))]
    assert_rows_independent(call, inputs, (0, 1, 2))


def test_autocast():
    tensors = make_tensors(SMALL)
    padding = make_padding(SMALL, "bool")
    for need_weights in (False, True):
        options = dict(key_padding_mask=padding, need_weights=need_weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = call_with(kernel, tensors, 4, **options)
            theirs = call_with(F.multi_head_attention_forward, tensors, 4, **options)
        exact = call_with(F.multi_head_attention_forward, widened(tensors), 4, **options)
        for found, peer, oracle in zip(ours, theirs, exact, strict=True):
            assert (found is None) == (peer is None)
            if found is not None:
                assert found.dtype == peer.dtype
                testing.check(found.bfloat16(), oracle, [peer.bfloat16()], reduction=16)


def test_transforms():
    tensors = make_tensors(SMALL)
    names = list(tensors)
    function = by_tensors(U.multi_head_attention_forward, names, 4, need_weights=False)
    stacked = torch.stack([tensors["query"], tensors["query"] + 1])
    rest = list(tensors.values())[1:]
    found = torch.func.vmap(lambda q: function(q, *rest)[0])(stacked)
    one = [function(q, *rest)[0] for q in stacked]
    for ours, theirs in zip(found, one, strict=True):
        testing.check(ours, theirs.double(), [theirs], reduction=terms(SMALL))
    gradient = torch.func.grad(lambda q: function(q, *rest)[0].sum())(tensors["query"])
    leaf = tensors["query"].requires_grad_()
    (wanted,) = torch.autograd.grad(function(leaf, *rest)[0].sum(), leaf)
    testing.check(gradient, wanted.double(), [wanted], reduction=terms(SMALL))


def test_choice():
    tensors = make_tensors(SMALL)

    def chosen(changes=None, **options):
        options = dict(need_weights=False) | options
        found = udlkernels.explain(
            call_with, U.multi_head_attention_forward, tensors | (changes or {}), 4, **options
        )
        return [(c.op, c.implementation) for c in found.choices]

    op = "multi_head_attention_forward"
    assert chosen() == [(op, "kernel"), ("attention", "kernel")]
    assert chosen(need_weights=True) == [(op, "kernel"), ("attention", "kernel")]
    assert chosen(implementation="reference") == [(op, "reference")]
    assert chosen(implementation="torch") == [(op, "torch")]
    empty = dict(query=tensors["query"][:0])
    assert chosen(empty) == [(op, "torch")]
    with pytest.raises(udlkernels.ArgumentError, match="no elements"):
        chosen(empty, implementation="kernel")
    wide = make_tensors((1, 2, 2, 600, 1))
    with pytest.raises(udlkernels.ArgumentError, match="heads of 600 elements"):
        call_with(kernel, wide, 1, need_weights=False)
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
    ("case", "need_weights"), [*itertools.product([*BAD, *BAD_OPTIONS], [False, True])]
)
def test_bad_input_gives_torchs_own_answer(case, need_weights):
    tensors = make_tensors(SMALL)
    tensors |= BAD[case](tensors) if case in BAD else {}
    options = dict(heads=4, need_weights=need_weights) | BAD_OPTIONS.get(case, {})
    heads = options.pop("heads")
    with pytest.raises(Exception) as theirs:
        call_with(F.multi_head_attention_forward, tensors, heads, **options)
    for implementation in ("auto", "torch"):
        with pytest.raises(Exception) as ours:
            more = dict(implementation=implementation)
            call_with(U.multi_head_attention_forward, tensors, heads, **options, **more)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
    with pytest.raises(udlkernels.ArgumentError, match="which cannot"):
        call_with(kernel, tensors, heads, **options)


def test_a_subclass_keeps_its_rules():
    class Mine(torch.Tensor):
        pass

    tensors = make_tensors(SMALL)
    tensors["query"] = tensors["query"].as_subclass(Mine)
    out, _ = call_with(U.multi_head_attention_forward, tensors, 4, need_weights=False)
    assert type(out) is Mine
