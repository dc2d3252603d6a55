"""score_mod and mask_mod of attention: modifiers that the kernels know, and any other function."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import udlkernels
from tests.support import assert_compiles, assert_deterministic
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.attention import modifiers
from udlkernels.attention.attention import reference
from udlkernels.attention.attention.op import _attend

B, H, T = 2, 4, 19
SLOPES = 0.5 ** torch.arange(1.0, H + 1)
BY_SAMPLE = torch.stack((SLOPES, 2 * SLOPES))
PREFIX, LENGTHS = torch.tensor([3, 11]), torch.tensor([9, 19])
IDS = torch.tensor([0] * 5 + [1] * 1 + [4] * 8 + [2] * 5)
PACKED = torch.stack((IDS, torch.arange(T) // 7))
COMING_BACK = torch.arange(T) % 3

# A modifier, and the same as a plain function. Tensors go to the device they are used on.
MASKS = {
    "causal": (lambda t: modifiers.causal(), lambda t: lambda b, h, i, j: j <= i),
    "shifted": (lambda t: modifiers.causal(3), lambda t: lambda b, h, i, j: j <= i + 3),
    "window": (
        lambda t: modifiers.window(4, 2),
        lambda t: lambda b, h, i, j: (j >= i - 4) & (j <= i + 2),
    ),
    "left": (lambda t: modifiers.window(5, None, -1), lambda t: lambda b, h, i, j: j >= i - 6),
    "prefix": (
        lambda t: modifiers.prefix_lm(6),
        lambda t: lambda b, h, i, j: (j < 6) | (j <= i),
    ),
    "prefixes": (
        lambda t: modifiers.prefix_lm(t(PREFIX)),
        lambda t: lambda b, h, i, j: (j < t(PREFIX)[b]) | (j <= i),
    ),
    "padding": (
        lambda t: modifiers.key_padding(t(LENGTHS)),
        lambda t: lambda b, h, i, j: j < t(LENGTHS)[b],
    ),
    "document": (
        lambda t: modifiers.document(t(IDS)),
        lambda t: lambda b, h, i, j: t(IDS)[i] == t(IDS)[j],
    ),
    "documents": (
        lambda t: modifiers.document(t(PACKED)),
        lambda t: lambda b, h, i, j: t(PACKED)[b, i] == t(PACKED)[b, j],
    ),
    "coming_back": (
        lambda t: modifiers.document(t(COMING_BACK)),
        lambda t: lambda b, h, i, j: (i - j) % 3 == 0,
    ),
}
SCORES = {
    "softcap": (
        lambda t: modifiers.softcap(1.5),
        lambda t: lambda s, b, h, i, j: 1.5 * torch.tanh(s / 1.5),
    ),
    "alibi": (
        lambda t: modifiers.alibi(t(SLOPES)),
        lambda t: lambda s, b, h, i, j: s - t(SLOPES)[h] * (j - i).abs(),
    ),
    "alibi_by_sample": (
        lambda t: modifiers.alibi(t(BY_SAMPLE), 2),
        lambda t: lambda s, b, h, i, j: s - t(BY_SAMPLE)[b, h] * (j - i - 2).abs(),
    ),
    "both": (
        lambda t: modifiers.softcap(1.5).then(modifiers.alibi(t(SLOPES))),
        lambda t: lambda s, b, h, i, j: 1.5 * torch.tanh(s / 1.5) - t(SLOPES)[h] * (j - i).abs(),
    ),
}


def _inputs(dtype=torch.float32, device="cpu", keys=T):
    shapes = [(B, H, T, 8), (B, 2, keys, 8), (B, 2, keys, 6)]
    return [testing.make(s, dtype, device=device, seed=n) for n, s in enumerate(shapes)]


def _mods(pair, device="cpu"):
    return [make(lambda tensor: tensor.to(device)) for make in pair]


def _kernel(q, k, v, **options):
    return U.attention(q, k, v, **options, implementation="kernel")


def _function(function, **options):
    return lambda q, k, v, bias=None: function(q, k, v, bias=bias, **options)


def _compare(inputs, ours, plain, **options):
    formula = _function(reference.attention, **plain, **options)
    return testing.compare(
        _function(_kernel, **ours, **options), formula, [formula], inputs, reduction=T * 2 + 14
    )


def _choice(**options):
    (choice,) = udlkernels.explain(U.attention, *_inputs(), **options).choices
    return choice


@pytest.mark.parametrize("name", MASKS)
def test_each_mask(backend, dtype, name):
    ours, plain = _mods(MASKS[name], backend.device)
    inputs = _inputs(dtype, backend.device)
    _compare(inputs, dict(mask_mod=ours), dict(mask_mod=plain), return_lse=True)


@pytest.mark.parametrize("name", SCORES)
def test_each_score(backend, dtype, name):
    ours, plain = _mods(SCORES[name], backend.device)
    inputs = _inputs(dtype, backend.device)
    _compare(inputs, dict(score_mod=ours), dict(score_mod=plain), return_lse=True)


@pytest.mark.parametrize("name", [n for n in MASKS if n[:8] not in ("document", "coming_b")])
@pytest.mark.parametrize(("keys", "causal"), [(7, None), (33, "bottom_right")])
def test_other_numbers_of_keys(backend, name, keys, causal):
    ours, plain = _mods(MASKS[name], backend.device)
    inputs = _inputs(device=backend.device, keys=keys)
    _compare(inputs, dict(mask_mod=ours), dict(mask_mod=plain), causal=causal)


@pytest.mark.parametrize("first", MASKS)
def test_pairs_of_masks(backend, first):
    inputs = _inputs(device=backend.device)
    names = list(MASKS)
    for second in names[names.index(first) + 1 :: 3 if backend.small else 1]:
        (a, plain_a), (b, plain_b) = (_mods(MASKS[n], backend.device) for n in (first, second))

        def plain(*at, one=plain_a, other=plain_b):
            return one(*at) & other(*at)

        _compare(inputs, dict(mask_mod=a & b), dict(mask_mod=plain))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", ["shifted", "window", "prefixes", "documents"])
def test_scores_with_masks_and_options(backend, score, mask):
    inputs = _inputs(device=backend.device)
    (ours, plain), (mask_mod, plain_mask) = (
        _mods(pair, backend.device) for pair in (SCORES[score], MASKS[mask])
    )
    options = dict(
        key_lengths=LENGTHS.to(backend.device), window=(9, 9), dropout_p=0.3, return_lse=True,
        seed=torch.tensor([3], device=backend.device), scale=-0.3,
        mask=(testing.make((B, 1, T, T)) > -1).to(backend.device),
    )  # fmt: skip
    bias = testing.make((1, H, T, T), device=backend.device, seed=8)
    mods = dict(score_mod=ours, mask_mod=mask_mod), dict(score_mod=plain, mask_mod=plain_mask)
    _compare([*inputs, bias], *mods, **options)


def test_options_come_behind_the_score():
    """score_mod first, then softcap, slopes and bias."""
    q, k, v = _inputs(torch.float64)
    bias = testing.make((T, T), torch.float64)
    slopes = SLOPES.double()

    def whole(s, b, h, i, j):
        s = 2.0 * torch.tanh((s + i * 0.1) / 2.0)
        return s - slopes[h] * (j - i).abs() + bias[i, j]

    options = dict(softcap=2.0, alibi_slopes=slopes, bias=bias, implementation="reference")
    found = U.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + i * 0.1, **options)
    expected = U.attention(q, k, v, score_mod=whole, implementation="reference")
    testing.check(found, expected, [])


def test_hidden_keys_leave_no_trace(backend):
    q, k, v = _inputs(device=backend.device)
    for name in ("documents", "prefixes", "padding"):
        lengths = torch.tensor([12, 12], device=backend.device)
        mask = _mods(MASKS[name], backend.device)[0] & modifiers.key_padding(lengths)
        results = []
        for filler in (0.0, float("nan")):
            k[:, :, 12:], v[:, :, 12:] = filler, filler
            results.append(
                testing.run(_function(_kernel, mask_mod=mask), [q, k.clone(), v.clone()])
            )
        clean, found = (r.outputs + r.gradients[:3] for r in results)
        for ours, theirs in zip(found, clean, strict=True):
            assert torch.equal(ours, theirs) and ours.isfinite().all()


RECOGNISED = {
    "masks": lambda: dict(mask_mod=modifiers.causal() & modifiers.document(IDS)),
    "scores": lambda: dict(score_mod=modifiers.softcap(2.0).then(modifiers.alibi(SLOPES))),
    "behind": lambda: dict(
        score_mod=modifiers.softcap(2.0), alibi_slopes=SLOPES, causal="top_left"
    ),
    "shared diagonal": lambda: dict(
        score_mod=modifiers.alibi(SLOPES, 2), mask_mod=modifiers.causal(4), window=(9, None)
    ),
    "mask": lambda: dict(mask_mod=modifiers.document(COMING_BACK), mask=IDS > 0),
}
NOT_KNOWN = "_mod is not one of udlkernels.attention.modifiers"
UNRECOGNISED = {
    "function": (lambda: dict(score_mod=lambda s, *at: s * 2), f"score{NOT_KNOWN}"),
    "mask function": (lambda: dict(mask_mod=lambda b, h, i, j: j <= i), f"mask{NOT_KNOWN}"),
    "either": (
        lambda: dict(mask_mod=modifiers.causal() | modifiers.document(IDS)),
        f"mask{NOT_KNOWN}",
    ),
    "rest": (lambda: dict(mask_mod=~modifiers.causal(-1)), f"mask{NOT_KNOWN}"),
    "with a function": (
        lambda: dict(mask_mod=modifiers.causal() & (lambda b, h, i, j: j > 2)),
        f"mask{NOT_KNOWN}",
    ),
    "after a function": (
        lambda: dict(score_mod=modifiers.softcap(2.0).then(lambda s, *at: s + 1)),
        f"score{NOT_KNOWN}",
    ),
    "order": (
        lambda: dict(score_mod=modifiers.alibi(SLOPES).then(modifiers.softcap(2.0))),
        "score_mod bounds a score twice, or after ALiBi",
    ),
    "argument's order": (
        lambda: dict(score_mod=modifiers.alibi(SLOPES), softcap=2.0),
        "softcap bounds what ALiBi has changed",
    ),
    "two bounds": (
        lambda: dict(score_mod=modifiers.softcap(2.0), softcap=2.0),
        "score_mod bounds a score twice, or after ALiBi",
    ),
    "two slopes": (
        lambda: dict(score_mod=modifiers.alibi(SLOPES, 1), alibi_slopes=SLOPES),
        "score_mod is not the only ALiBi",
    ),
    "off the diagonal": (
        lambda: dict(score_mod=modifiers.alibi(SLOPES), mask_mod=modifiers.causal(-2)),
        "mask_mod's windows leave out the diagonal, or everything",
    ),
    "everything": (
        lambda: dict(mask_mod=modifiers.causal(-9) & modifiers.window(2, None)),
        "mask_mod's windows leave out the diagonal, or everything",
    ),
    "slopes": (
        lambda: dict(score_mod=modifiers.alibi(SLOPES.clone().requires_grad_())),
        "alibi_slopes needs a gradient",
    ),
}


def _plain(options):
    """The same with the modifiers wrapped in functions, for the formula."""
    wrapped = dict(options)
    for name in ("score_mod", "mask_mod"):
        if name in options:
            wrapped[name] = lambda *at, mod=options[name]: mod(*at)
    return wrapped


@pytest.mark.parametrize("name", RECOGNISED)
def test_recognised(name):
    options = RECOGNISED[name]()
    choice = _choice(**options)
    assert choice.implementation == "kernel"
    inputs = _inputs()
    _compare(inputs, options, _plain(options))


@pytest.mark.parametrize("name", UNRECOGNISED)
def test_not_recognised(name):
    make, reason = UNRECOGNISED[name]
    options = make()
    choice = _choice(**options)
    assert choice.implementation == "reference" and reason in choice.not_taken["kernel"]
    inputs = _inputs(torch.float64)
    out = U.attention(*inputs, **options)
    assert torch.equal(out, reference.attention(*inputs, **_plain(options)))
    with pytest.raises(udlkernels.ArgumentError, match=reason.replace(".", r"\.")):
        U.attention(*inputs, **options, implementation="kernel")


def test_combinations_are_what_they_say():
    grid = torch.arange(T)[:, None], torch.arange(T)
    one, other = modifiers.causal(1), modifiers.document(IDS)
    a, b = one(0, 0, *grid), other(0, 0, *grid)
    assert torch.equal((one & other)(0, 0, *grid), a & b)
    assert torch.equal((one | other)(0, 0, *grid), a | b)
    assert torch.equal((~one)(0, 0, *grid), ~a)

    def odd(b, h, i, j):
        return j % 2 == 1

    assert torch.equal((odd & one)(0, 0, *grid), a & odd(0, 0, *grid))
    assert torch.equal((odd | one)(0, 0, *grid), a | odd(0, 0, *grid))


def test_documents_lie_in_ranges_where_they_can():
    ranges = modifiers.document(PACKED).ranges
    starts = [[int((row == i).nonzero()[0]) for i in row] for row in PACKED]
    ends = [[int((row == i).nonzero()[-1]) + 1 for i in row] for row in PACKED]
    assert ranges.tolist() == torch.stack((torch.tensor(starts), torch.tensor(ends)), -1).tolist()
    assert modifiers.document(COMING_BACK).ranges is None
    assert modifiers.document(torch.stack((IDS, COMING_BACK))).ranges is None


@pytest.mark.parametrize("window", [(0, 2**62, 2**62), (2, 9, 0)], ids=["all", "window"])
def test_ranges_may_hold_anything(backend, dtype, window):
    """Empty ones, reversed ones, and numbers beyond the keys, in the ops that take ranges."""
    generator = torch.Generator().manual_seed(4)
    ranges = torch.randint(-4, T + 9, (B, T, 2), generator=generator)
    ranges[0, 3], ranges[0, 4], ranges[1, :2] = torch.tensor(
        [[-(2**62), 2**62], [2**40, 5], [4, 4]]
    )
    ranges = ranges.to(backend.device)
    blocks = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]], device=backend.device) > 0
    bias = testing.make((1, H, T, T), dtype, device=backend.device, seed=8)
    inputs = [*_inputs(dtype, backend.device), bias]
    for given in (ranges, ranges[:1]):
        for sparse in (dict(), dict(block_mask=blocks[None, None], block_size=7)):

            def kernel(q, k, v, bias, given=given, sparse=sparse):
                options = *window, 0.4, 0.0, 0.0, None, False, True
                return _attend(q, k, v, None, bias, *(None,) * 3, *options, ranges=given, **sparse)

            def formula(q, k, v, bias, given=given, sparse=sparse):
                options = None, *window, 0.4, 0.0, 0.0
                return reference.attend(
                    q, k, v, None, bias, *(None,) * 3, *options, ranges=given, **sparse
                )

            testing.compare(kernel, formula, [formula], inputs, reduction=T * 2 + 14)


def test_gradients_of_what_a_function_uses():
    q, k, v = (t.requires_grad_() for t in _inputs(torch.float64))
    table = testing.make((H, 2 * T), torch.float64).requires_grad_()
    out = U.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, j - i + T])
    places = torch.arange(T) - torch.arange(T)[:, None] + T
    expected = U.attention(q, k, v, bias=table[:, places], implementation="reference")
    testing.check(out, expected, [])
    found = torch.autograd.grad(out.sin().sum(), (q, k, v, table))
    wanted = torch.autograd.grad(expected.sin().sum(), (q, k, v, table))
    for ours, theirs in zip(found, wanted, strict=True):
        testing.check(ours, theirs, [], reduction=B * T * T)


def test_double_backward():
    tensors = [t.requires_grad_() for t in _inputs(torch.float64)]
    for mask in ("prefixes", "documents", "coming_back"):
        options = dict(
            score_mod=_mods(SCORES["both"])[0], mask_mod=_mods(MASKS[mask])[0], return_lse=True
        )
        assert torch.autograd.gradgradcheck(_function(_kernel, **options), tensors, fast_mode=True)


@pytest.mark.parametrize(("score", "mask"), [("both", "documents"), ("both", "window")])
def test_compiled(score, mask):
    ours, mask_mod = _mods(SCORES[score])[0], _mods(MASKS[mask])[0]
    function = _function(_kernel, score_mod=ours, mask_mod=mask_mod, return_lse=True)
    assert_compiles(function, [_inputs()], ("attention_fwd", "attention_bwd"))


def test_compiled_with_modifiers_made_inside():
    def call(q, k, v, ids, lengths):
        mask = modifiers.document(ids) & modifiers.key_padding(lengths) & modifiers.causal()
        return _kernel(q, k, v, mask_mod=mask, score_mod=modifiers.softcap(3.0))

    inputs = [*_inputs(), COMING_BACK, LENGTHS]
    assert_compiles(call, [inputs], ("attention_fwd", "attention_bwd"))


def test_compiled_with_any_function():
    def call(q, k, v):
        return U.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 0.1 * j, causal="top_left")

    inputs = _inputs()
    found = testing.run(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs)
    wanted = testing.run(call, inputs)
    for ours, theirs in zip(
        found.outputs + found.gradients, wanted.outputs + wanted.gradients, strict=True
    ):
        testing.check(ours, theirs.double(), [], reduction=T)


def test_same_bits_at_any_thread_count(dtype_any):
    for mask in ("prefixes", "documents"):
        options = dict(mask_mod=_mods(MASKS[mask])[0], score_mod=_mods(SCORES["both"])[0])
        assert_deterministic(_function(_kernel, **options), _inputs(dtype_any))


def test_a_row_does_not_depend_on_other_ranges(backend, dtype):
    """A query's bits stay what they are when other queries see other keys."""
    inputs = _inputs(dtype, backend.device)
    ids = IDS.to(backend.device).clone()
    whole = _kernel(*inputs, mask_mod=modifiers.document(ids))
    ids[6:] = torch.arange(T - 6, device=backend.device) + 9
    found = _kernel(*inputs, mask_mod=modifiers.document(ids))
    assert torch.equal(found[:, :, :6], whole[:, :, :6])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", ["alibi_by_sample", "both"])
def test_flex_attention_takes_them(score, mask):
    score_mod, mask_mod = _mods(SCORES[score])[0], _mods(MASKS[mask])[0]
    inputs = _inputs()
    blocks = create_block_mask(mask_mod, B, H, T, T, device="cpu", BLOCK_SIZE=8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is slow without torch.compile
        found = flex_attention(*inputs, score_mod, blocks, enable_gqa=True)
    exact = reference.attention(
        *(t.double() for t in inputs), score_mod=score_mod, mask_mod=mask_mod
    )
    peer = reference.attention(*inputs, score_mod=score_mod, mask_mod=mask_mod)
    testing.check(found, exact, [peer], reduction=T + 14)


def test_flex_attention_serves_functions():
    """On the CPU only where it is asked for, and without gradients."""
    inputs = _inputs()
    options = dict(
        score_mod=lambda s, b, h, i, j: s + 0.1 * j, mask_mod=lambda b, h, i, j: (i + j) % 3 < 2,
        window=(9, None), alibi_slopes=SLOPES, softcap=3.0, key_lengths=LENGTHS,
    )  # fmt: skip
    found = U.attention(*inputs, **options, implementation="torch")
    exact = reference.attention(*(t.double() for t in inputs), **options)
    testing.check(found, exact, [reference.attention(*inputs, **options)], reduction=T + 14)
    inputs[0].requires_grad_()
    for change, reason in (
        (dict(), "flex_attention has no backward on the CPU"),
        (dict(return_lse=True), "flex_attention has no lse on the CPU"),
        (dict(bias=torch.zeros(T)), "flex_attention has no bias"),
        (dict(dropout_p=0.5), "flex_attention has no dropout_p"),
    ):
        with pytest.raises(udlkernels.ArgumentError, match=reason):
            U.attention(*inputs, **options, **change, implementation="torch")


@pytest.mark.parametrize("rows", [0, 3])
def test_empty(rows):
    q, k = torch.ones(2, 1, rows, 4), torch.ones(2, 1, 3 - rows, 4)
    mods = dict(score_mod=lambda s, *at: s + 1, mask_mod=lambda b, h, i, j: j <= i)
    assert not U.attention(q, k, k, **mods).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: dict(score_mod=3), "score_mod: expected a function, got int"),
        (lambda: dict(mask_mod=torch.ones(3)), "mask_mod: expected a function, got Tensor"),
        (
            lambda: dict(score_mod=modifiers.alibi(torch.ones(3))),
            r"score_mod: expected slopes \[H\] or \[B, H\] = \[4\] or \[2, 4\] on cpu, got",
        ),
        (
            lambda: dict(mask_mod=modifiers.key_padding(torch.tensor([3]))),
            r"mask_mod: expected lengths \[B\] = \[2\] on cpu",
        ),
        (
            lambda: dict(mask_mod=modifiers.prefix_lm(torch.tensor([3]))),
            r"mask_mod: expected prefix lengths \[B\] = \[2\] on cpu",
        ),
        (
            lambda: dict(mask_mod=modifiers.document(torch.arange(5))),
            r"mask_mod: expected document ids \[T\] or \[B, T\] = \[19\] or \[2, 19\] on cpu",
        ),
        (
            lambda: dict(mask_mod=modifiers.document(IDS), k=torch.ones(B, 2, 5, 8)),
            "mask_mod: expected as many keys as queries, for documents, got 19 queries and 5 keys",
        ),
        (lambda: modifiers.causal(1.5), r"\[causal\] offset: expected an integer"),
        (lambda: modifiers.window(None, None), r"\[window\] left: expected a limit on one side"),
        (lambda: modifiers.window(-1, 2), r"\[window\] left: expected an integer >= 0 or None"),
        (lambda: modifiers.prefix_lm(0.5), r"\[prefix_lm\] prefix_length: expected an integer"),
        (lambda: modifiers.prefix_lm(SLOPES), r"expected a tensor of integers \[B\]"),
        (lambda: modifiers.document(PACKED > 0), r"tensor of integers \[T\] or \[B, T\]"),
        (lambda: modifiers.key_padding([3, 4]), r"\[key_padding\] lengths: .* got list"),
        (lambda: modifiers.alibi(0.5), r"\[alibi\] slopes: expected a floating point tensor"),
        (lambda: modifiers.softcap(0.0), r"\[softcap\] cap: expected a finite number > 0"),
    ],
)
def test_bad_input(options, message):
    q, k, v = _inputs()
    with pytest.raises(udlkernels.ArgumentError, match=message):
        given = options()
        k = given.pop("k", k)
        U.attention(q, k, v[:, :, : k.shape[2]], **given)
