"""attention_varlen: values, gradients, the bits of attention, options, compilation, errors."""

from __future__ import annotations

import math

import pytest
import torch

import udlkernels
from tests.support import assert_compiles, assert_deterministic, assert_opcheck
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.attention.attention_varlen import reference

# H, Hkv, D, Dv
HEADS = [(4, 4, 8, 8), (4, 2, 7, 9), (3, 1, 64, 64), (2, 1, 128, 1), (2, 2, 1, 16)]
# Lengths of the queries and of the keys: none of one, none of the other, many, alike.
LENGTHS = ((5, 0, 3, 70, 1, 64, 130), (7, 4, 0, 65, 300, 64, 33))
SMALL_LENGTHS = ((5, 0, 3, 17, 1), (7, 4, 0, 20, 34))
OPTIONS = {
    "top_left": lambda case: dict(causal="top_left"),
    "bottom_right": lambda case: dict(causal="bottom_right"),
    "window": lambda case: dict(window=(3, 2)),
    "left_window": lambda case: dict(window=(2, None), causal="bottom_right"),
    "alibi_slopes": lambda case: dict(alibi_slopes=0.5 ** torch.arange(1.0, case.heads[0] + 1)),
    "slopes_of_samples": lambda case: dict(
        alibi_slopes=testing.make((case.batch, case.heads[0]), seed=9).sigmoid() / 2
    ),
    "softcap": lambda case: dict(softcap=1.5),
    "sinks": lambda case: dict(sinks=testing.make((case.heads[0],), case.dtype, seed=5)),
    "scale": lambda case: dict(scale=-0.3),
    "dropout_p": lambda case: dict(dropout_p=0.4, seed=torch.tensor([77])),
    "return_lse": lambda case: dict(return_lse=True),
}


class _Case:
    """Packed q, k and v, with `rest` rows behind the last sequence, and the sequences' ends."""

    def __init__(
        self, device="cpu", dtype=torch.float32, heads=(4, 2, 8, 6), lengths=SMALL_LENGTHS,
        layout="contiguous", rest=0, values="normal",
    ):  # fmt: skip
        h, hkv, d, dv = heads
        if isinstance(lengths[0], int):  # as many keys as queries
            lengths = (lengths, lengths)
        self.device, self.dtype, self.heads, self.batch = device, dtype, heads, len(lengths[0])
        self.ends = [torch.tensor([0, *count]).cumsum(0).to(device) for count in lengths]
        rows, keys = (int(ends[-1]) + rest for ends in self.ends)
        self.tensors = [
            testing.make(shape, dtype, values, layout, device, seed)
            for seed, shape in enumerate([(rows, h, d), (keys, hkv, d), (keys, hkv, dv)])
        ]
        self.reduction = d + dv + max(rows * h // hkv, keys)

    def options(self, name):
        given = OPTIONS[name](self)
        return {
            key: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for key, value in given.items()
        }

    def sequences(self):
        """Of each its number, and its rows in q and in k."""
        ends_q, ends_k = (ends.tolist() for ends in self.ends)
        for b in range(self.batch):
            yield b, slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])


def _function(function, ends, **options):
    """The function of (q, k, v, sinks), which so have gradients."""

    def call(q, k, v, sinks=None):
        return function(q, k, v, *ends, sinks=sinks, **options)

    return call


def _kernel(*args, **options):
    return U.attention_varlen(*args, **options, implementation="kernel")


def _compare(case, **options):
    """The kernel against the formula, with these options."""
    tensors = [*case.tensors, options.pop("sinks", None)]
    formula = _function(reference.attention_varlen, case.ends, **options)
    reduction = case.reduction + (0 if tensors[3] is None else case.tensors[0].numel())
    return testing.compare(
        _function(_kernel, case.ends, **options), formula, [formula], tensors, reduction=reduction
    )


def test_values_and_gradients(every_backend, dtype):
    for heads in HEADS[:2] if every_backend.small else HEADS:
        lengths = SMALL_LENGTHS if every_backend.small else LENGTHS
        _compare(_Case(every_backend.device, dtype, heads, lengths), return_lse=True)


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(backend, dtype, option):
    lengths = SMALL_LENGTHS if backend.small else LENGTHS
    case = _Case(backend.device, dtype, (4, 2, 16, 12), lengths)
    _compare(case, **case.options(option))


def test_all_options_at_once(backend, dtype):
    case = _Case(backend.device, dtype, lengths=SMALL_LENGTHS if backend.small else LENGTHS)
    options = {}
    for name in OPTIONS:
        options |= case.options(name)
    _compare(case, **options)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, dtype, layout):
    case = _Case(backend.device, dtype, layout=layout)
    found = _compare(case, causal="top_left", return_lse=True)
    out, lse = found.outputs
    rows, heads, _ = case.tensors[0].shape
    assert out.shape == (rows, heads, 6) and out.is_contiguous()
    assert lse.shape == (heads, rows) and lse.is_contiguous()


@pytest.mark.parametrize("values", ["shifted", "large", "zeros"])
def test_values(backend, dtype, values):
    case = _Case(backend.device, dtype, values=values)
    formula = _function(reference.attention_varlen, case.ends)
    testing.compare(
        _function(_kernel, case.ends), formula, [formula], case.tensors, gradients=False,
        reduction=case.reduction,
    )  # fmt: skip


ALONE = {
    "plain": [],
    "top_left": ["top_left"],
    "bottom_right": ["bottom_right"],
    "left_window": ["left_window", "sinks"],
    "window": ["window", "slopes_of_samples", "softcap"],
}


@pytest.mark.parametrize("names", ALONE.values(), ids=ALONE)
def test_a_sequence_has_the_bits_of_attention_alone(backend, dtype, names):
    """Forward and backward, whatever lies in front of it, behind it and beside it."""
    lengths = SMALL_LENGTHS if backend.small else ((33, 1, 200, 64, 0, 7), (40, 65, 130, 64, 5, 7))
    case = _Case(backend.device, dtype, (4, 2, 16, 12), lengths, rest=3)
    options = {}
    for name in names:
        options |= case.options(name)
    sinks = options.pop("sinks", None)
    whole = testing.run(
        _function(_kernel, case.ends, return_lse=True, **options), [*case.tensors, sinks]
    )
    cotangents = testing.make_cotangents(whole.outputs)
    for b, rows, keys in case.sequences():
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        mine = dict(options)
        if "alibi_slopes" in mine:
            mine["alibi_slopes"] = mine["alibi_slopes"][b]

        def alone(q, k, v, mine=mine):
            out, lse = U.attention(
                q, k, v, sinks=sinks, layout="bthd", return_lse=True, implementation="kernel",
                **mine,
            )  # fmt: skip
            return out, lse

        q, k, v = case.tensors
        found = testing.run(
            alone,
            [t[None] for t in (q[rows], k[keys], v[keys])],
            [cotangents[0][rows][None], cotangents[1][:, rows][None]],
        )
        assert torch.equal(found.outputs[0][0], whole.outputs[0][rows])
        assert torch.equal(found.outputs[1][0], whole.outputs[1][:, rows])
        for ours, theirs, part in zip(
            found.gradients, whole.gradients[:3], (rows, keys, keys), strict=True
        ):
            assert torch.equal(ours[0], theirs[part])


def test_rows_behind_the_last_sequence(backend, dtype):
    case = _Case(backend.device, dtype, rest=7)
    sinks = case.options("sinks")["sinks"]
    for options in ({}, dict(causal="bottom_right", sinks=sinks)):
        found = _compare(case, return_lse=True, **options)
        out, lse = found.outputs
        assert not out[-7:].any() and (lse[:, -7:] == -math.inf).all()
        assert not any(gradient[-7:].any() for gradient in found.gradients[:3])
    # NaN there reaches nothing.
    poisoned = [t.clone() for t in case.tensors]
    for t in poisoned:
        t[-7:] = math.nan
    clean = testing.run(_function(_kernel, case.ends), case.tensors)
    found = testing.run(_function(_kernel, case.ends), poisoned)
    assert torch.equal(found.outputs[0], clean.outputs[0])
    for ours, theirs in zip(found.gradients, clean.gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_sequences_do_not_see_each_other(backend):
    case = _Case(backend.device)
    q, k, v = case.tensors
    clean = _kernel(q, k, v, *case.ends)
    for b, _, keys in case.sequences():
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[keys], bad_v[keys] = math.nan, math.inf
        out = _kernel(q, bad_k, bad_v, *case.ends)
        for other, rows, _ in case.sequences():
            assert other == b or torch.equal(out[rows], clean[rows])


def test_many_short_sequences(backend):
    lengths = tuple(n % 3 for n in range(40 if backend.small else 400))
    _compare(_Case(backend.device, heads=(2, 1, 4, 4), lengths=lengths), causal="top_left")


def test_ends_of_every_kind(backend):
    case = _Case(backend.device)
    expected = _kernel(*case.tensors, *case.ends)
    for ends in (
        [e.int() for e in case.ends],
        [case.ends[0].int(), case.ends[1]],
        [e.repeat_interleave(2)[::2] for e in case.ends],
    ):
        assert torch.equal(_kernel(*case.tensors, *ends), expected)


def test_ends_that_are_not_checked_stay_in_bounds(backend):
    """As compiled code hands them on: a GPU's results may be anything, their neighbours not.

    The C++ kernels raise.
    """
    case = _Case(backend.device, layout="sliced")
    wrong = torch.tensor([0, 3, 2**40, -5, 7, 10**6], device=backend.device)
    args = *case.tensors, wrong, wrong.flip(0), None, None, 1, 2**62, 0, 0.3, 0.0, 0.0, None
    op = torch.ops.udlkernels
    if backend.name.startswith("cpu-"):
        for ends in ([0, 3, 10**6], [1, 2, 3], [0, 3, 2]):
            ends = torch.tensor(ends)
            with pytest.raises(RuntimeError):
                op.attention_varlen_fwd(*case.tensors, ends, ends, *args[5:])
        return
    out, lse = op.attention_varlen_fwd(*args)
    assert out.shape[0] == lse.shape[1] == case.tensors[0].shape[0]
    op.attention_varlen_bwd(
        out, None, *case.tensors, out, lse, *args[3:], True, True, False
    )  # fmt: skip


def test_gradients_only_where_wanted(backend):
    case = _Case(backend.device)
    tensors = [*case.tensors, case.options("sinks")["sinks"]]
    function = _function(_kernel, case.ends, causal="bottom_right")
    whole = testing.run(function, tensors).gradients
    for i in range(4):
        some = [t.detach().requires_grad_(i == n) for n, t in enumerate(tensors)]
        out = function(*some)
        (found,) = torch.autograd.grad(out, some[i], *testing.make_cotangents([out]))
        assert torch.equal(found, whole[i])


def test_gradcheck_on_the_kernel():
    case = _Case(dtype=torch.float64, heads=(2, 1, 3, 2), lengths=((2, 0, 3), (3, 1, 2)), rest=1)
    tensors = [t.requires_grad_() for t in (*case.tensors, case.options("sinks")["sinks"])]
    options = dict(causal="bottom_right", softcap=2.0, return_lse=False)
    for more in ({}, options, dict(dropout_p=0.3, seed=torch.tensor([3]))):
        function = _function(_kernel, case.ends, **more)
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
def test_compiled(compiler):
    name, shapes = compiler.split("-")
    ops = ("attention_varlen_fwd", "attention_varlen_bwd")
    sets = []
    for count in (6, 9):  # no size equals another by chance
        case = _Case(lengths=((3, 0, count), (4, 2, count + 2)))
        sets.append([*case.tensors, case.options("sinks")["sinks"], *case.ends])

    def function(q, k, v, sinks, cu_q, cu_k):
        return _kernel(
            q, k, v, cu_q, cu_k, sinks=sinks, causal="bottom_right", window=(4, None),
            return_lse=True,
        )  # fmt: skip

    assert_compiles(function, sets, ops, name, shapes == "dynamic")
    if compiler == "aot_eager-static":  # Inductor draws other seeds than eager
        case = _Case()
        slopes = case.options("slopes_of_samples")
        dropped = _function(_kernel, case.ends, dropout_p=0.2, softcap=2.0, **slopes)
        assert_compiles(dropped, [case.tensors], ops, name)


def test_opcheck():
    op = torch.ops.udlkernels
    case = _Case(lengths=((3, 0, 5), (4, 2, 5)), rest=1)
    slopes, sinks = torch.rand(3, 4), torch.randn(4)
    numbers = (1, 3, 2**62, 0.4, 2.0, 0.25, torch.tensor([5]))
    plain = (0, 2**62, 2**62, 0.4, 0.0, 0.0, None)
    for extras, last in (((None, None), plain), ((slopes, sinks), numbers)):
        args = (*case.tensors, *case.ends, *extras, *last)
        assert_opcheck(op.attention_varlen_fwd, args)
        out, lse = op.attention_varlen_fwd(*args)
        given = extras[1] is not None
        dlse = lse.clone().nan_to_num(0.0, 0.0, 0.0) if given else None
        back = (out, dlse, *case.tensors, out, lse, *args[3:])
        assert_opcheck(op.attention_varlen_bwd, (*back, True, True, given))
        assert_opcheck(op.attention_varlen_bwd, (*back, not given, False, False))


def test_same_bits_at_any_thread_count(dtype_any):
    for lengths in (LENGTHS, (1, 700, 3)):
        case = _Case(dtype=dtype_any, heads=(4, 2, 16, 24), lengths=lengths)
        sinks = case.options("sinks")["sinks"]
        assert_deterministic(_function(_kernel, case.ends), case.tensors)
        more = dict(causal="bottom_right", dropout_p=0.1, seed=torch.tensor([9]))
        assert_deterministic(_function(_kernel, case.ends, **more), [*case.tensors, sinks])


def test_dropout(backend):
    case = _Case(backend.device)
    seed = torch.tensor([-5], device=backend.device)
    plain = _kernel(*case.tensors, *case.ends)
    assert torch.equal(_kernel(*case.tensors, *case.ends, seed=seed), plain)
    assert not _kernel(*case.tensors, *case.ends, dropout_p=1.0, seed=seed).any()
    torch.manual_seed(3)
    first, second = (_kernel(*case.tensors, *case.ends, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(_kernel(*case.tensors, *case.ends, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_implementations_are_chosen():
    case = _Case()
    (choice,) = udlkernels.explain(U.attention_varlen, *case.tensors, *case.ends).choices
    assert choice.implementation == "kernel"
    slopes = torch.rand(4, requires_grad=True)
    U.attention_varlen(*case.tensors, *case.ends, alibi_slopes=slopes).sum().backward()
    assert slopes.grad.any()
    with pytest.raises(udlkernels.ArgumentError, match="alibi_slopes needs a gradient"):
        _kernel(*case.tensors, *case.ends, alibi_slopes=slopes)
    wide = [torch.randn(3, 1, 513)] * 3
    ends = [torch.tensor([0, 3])] * 2
    (choice,) = udlkernels.explain(U.attention_varlen, *wide, *ends).choices
    assert choice.implementation == "reference" and "513" in str(choice)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = U.attention_varlen(*case.tensors, *case.ends, implementation="reference")
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("empty", ["rows", "keys", "sequences"])
def test_empty(empty):
    ends = [torch.tensor([0, 0]), torch.tensor([0, 4])]
    rows, keys = 0, 4
    if empty == "keys":
        ends, rows, keys = ends[::-1], 4, 0
    elif empty == "sequences":
        ends, rows = [torch.tensor([0])] * 2, 3
    shapes = [(rows, 2, 5), (keys, 1, 5), (keys, 1, 6)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out, lse = U.attention_varlen(*tensors, *ends, return_lse=True)
    assert out.shape == (rows, 2, 6) and not out.any()
    assert lse.shape == (2, rows) and (lse == -math.inf).all()
    gradients = torch.autograd.grad(out.sum() + lse.exp().sum(), tensors)
    assert not any(gradient.any() for gradient in gradients)


def _ends(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.ones(2, 6, 4, 8)), r"q: expected 3 dimensions \[N, H, D\], got"),
        (dict(q=torch.ones(6, 4, 8).int()), "q: expected a floating point tensor, got"),
        (dict(k=torch.ones(9, 2, 8).half()), r"k: expected torch.float32 \(q's type\), got"),
        (dict(v=torch.ones(9, 2, 8, device="meta")), "v: expected a tensor on cpu"),
        (dict(k=torch.ones(9, 2, 7)), r"k: expected width 8 \(q's\)"),
        (dict(k=torch.ones(9, 3, 8)), "k: expected heads that divide q's 4"),
        (dict(v=torch.ones(8, 2, 8)), r"v: expected 9 rows of 2 heads \(k's\)"),
        (dict(cu_seqlens_q=_ends(0, 6).float()), "cu_seqlens_q: expected int32 or int64, one"),
        (dict(cu_seqlens_q=_ends(0, 6)[None]), r"cu_seqlens_q: expected .* \[B \+ 1\]"),
        (dict(cu_seqlens_k=_ends()), r"cu_seqlens_k: expected .* \[B \+ 1\]"),
        (dict(cu_seqlens_q=_ends(1, 3, 6)), r"cu_seqlens_q: expected 0, then .* got \[1, 3, 6\]"),
        (dict(cu_seqlens_q=_ends(0, 4, 3)), "cu_seqlens_q: expected 0, then ends that do not"),
        (dict(cu_seqlens_q=_ends(0, 3, 7)), r"cu_seqlens_q: expected .* up to 6 \(the rows\)"),
        (dict(cu_seqlens_k=_ends(0, 3, 10, dtype=torch.int32)), "cu_seqlens_k: .* up to 9"),
        (dict(cu_seqlens_k=_ends(0, 9)), r"cu_seqlens_k: expected 3 values \(cu_seqlens_q's\)"),
        (dict(causal=True), "causal: expected one of"),
        (dict(window=3), r"window: expected a pair \(left, right\)"),
        (dict(alibi_slopes=torch.ones(3)), r"alibi_slopes: expected .* \[4\] or \[2, 4\]"),
        (dict(sinks=torch.ones(2)), r"sinks: expected floating point, shape \[4\]"),
        (dict(sinks=torch.ones(4, device="meta")), "sinks: expected a tensor on cpu"),
        (dict(softcap=-1.0), "softcap: expected None or a finite number >= 0"),
        (dict(scale=math.inf), "scale: expected None or a finite number"),
        (dict(dropout_p=1.5), r"dropout_p: expected a probability in \[0, 1\]"),
        (dict(dropout_p=0.5, seed=torch.ones(1)), "seed: expected an int64 tensor of one value"),
        (dict(implementation="fast"), "implementation: expected one of"),
        (dict(implementation="torch"), "PyTorch has no such op"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input(change, message):
    given = dict(
        q=torch.ones(6, 4, 8), k=torch.ones(9, 2, 8), v=torch.ones(9, 2, 8),
        cu_seqlens_q=_ends(0, 2, 6), cu_seqlens_k=_ends(0, 5, 9),
    )  # fmt: skip
    with pytest.raises(udlkernels.ArgumentError, match=message) as error:
        U.attention_varlen(**(given | change))
    assert str(error.value).startswith("[attention_varlen] ")
