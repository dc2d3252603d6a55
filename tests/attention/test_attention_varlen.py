"""attention_varlen: values, gradients, options, bits of one sequence, compilation, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import assert_compiles, assert_deterministic, assert_opcheck
from udlkernels import functional as U
from udlkernels import testing
from udlkernels._errors import ArgumentError
from udlkernels.attention.attention_varlen import reference

# H, Hkv, D, Dv
HEADS = [(4, 4, 8, 8), (4, 2, 16, 5), (3, 1, 33, 64)]
# Queries and keys of each sequence; the last pair lies behind them all.
LENGTHS = [(5, 7), (0, 3), (70, 130), (1, 65), (9, 0), (64, 64), (3, 2)]
SMALL_HEADS, SMALL_LENGTHS = [(2, 1, 5, 6)], [(5, 7), (0, 3), (18, 20), (2, 0), (1, 1)]
OPTIONS = {
    "none": lambda case: {},
    "top_left": lambda case: dict(causal="top_left"),
    "bottom_right": lambda case: dict(causal="bottom_right"),
    "window": lambda case: dict(window=(3, 2)),
    "causal_window": lambda case: dict(window=(4, None), causal="bottom_right"),
    "slopes": lambda case: dict(alibi_slopes=testing.make((case.h,), device=case.device).abs()),
    "slopes_by_sequence": lambda case: dict(
        alibi_slopes=testing.make((len(case.lengths), case.h), device=case.device).abs(),
        causal="bottom_right",
    ),
    "softcap": lambda case: dict(softcap=1.5),
    "sinks": lambda case: dict(sinks=testing.make((case.h,), case.dtype, device=case.device)),
    "scale": lambda case: dict(scale=-0.3),
    "dropout": lambda case: dict(dropout_p=0.4, seed=torch.tensor([77], device=case.device)),
    "lse": lambda case: dict(return_lse=True),
}


class _Case:
    """Packed q, k, v of sequences with these lengths, and `rest` rows that belong to none."""

    def __init__(self, backend, dtype=torch.float32, heads=None, lengths=None, rest=0):
        small = backend.small
        self.device, self.dtype = backend.device, dtype
        self.h, hkv, d, dv = heads or (SMALL_HEADS if small else HEADS)[0]
        self.lengths = lengths or (SMALL_LENGTHS if small else LENGTHS)
        ends = torch.tensor([(0, 0), *self.lengths], device=self.device).cumsum(0)
        self.cu_q, self.cu_k = ends[:, 0].contiguous(), ends[:, 1].contiguous()
        nq, nk = (int(end) + rest for end in ends[-1])
        shapes = [(nq, self.h, d), (nk, hkv, d), (nk, hkv, dv)]
        self.tensors = [
            testing.make(shape, dtype, device=self.device, seed=seed)
            for seed, shape in enumerate(shapes)
        ]

    def function(self, fn, **options):
        sinks = options.pop("sinks", None)

        def call(q, k, v, sinks=None):
            return fn(q, k, v, self.cu_q, self.cu_k, sinks=sinks, **options)

        return call, [*self.tensors, *([sinks] if sinks is not None else [])]

    def compare(self, **options):
        kernel, tensors = self.function(_kernel, **options)
        formula, _ = self.function(reference.attention_varlen, **options)
        longest = max(max(pair) for pair in self.lengths)
        reduction = longest * self.h + sum(t.shape[-1] for t in self.tensors)
        if "sinks" in options:
            reduction += len(self.tensors[0]) * self.tensors[2].shape[-1]
        return testing.compare(kernel, formula, [formula], tensors, reduction=reduction)


def _kernel(*args, **options):
    return U.attention_varlen(*args, **options, implementation="kernel")


def test_values_and_gradients(every_backend, dtype):
    for heads in SMALL_HEADS if every_backend.small else HEADS:
        _Case(every_backend, dtype, heads).compare()


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(backend, dtype, option):
    case = _Case(backend, dtype)
    case.compare(**OPTIONS[option](case))


def test_options_together(backend):
    case = _Case(backend, rest=3)
    options = {}
    for option in OPTIONS.values():
        options |= option(case)
    case.compare(**options)


def test_rows_of_no_sequence_are_empty(backend):
    case = _Case(backend, rest=4)
    leaves = [t.requires_grad_() for t in case.tensors]
    out, lse = _kernel(*leaves, case.cu_q, case.cu_k, return_lse=True)
    out.sum().backward()
    assert not out[-4:].any() and bool((lse[:, -4:] == -math.inf).all())
    assert all(not t.grad[-4:].any() and bool(t.grad.isfinite().all()) for t in leaves)


@pytest.mark.parametrize("causal", [None, "top_left", "bottom_right"])
def test_a_sequence_has_the_bits_of_attention_on_it_alone(backend, dtype, causal):
    case = _Case(backend, dtype)
    kernel, tensors = case.function(_kernel, causal=causal, softcap=2.0, return_lse=True)
    packed = testing.run(kernel, tensors)
    cotangents = testing.make_cotangents(packed.outputs)
    for s, (queries, keys) in enumerate(case.lengths):
        if queries == 0 or keys == 0:
            continue
        q_rows = slice(int(case.cu_q[s]), int(case.cu_q[s]) + queries)
        k_rows = slice(int(case.cu_k[s]), int(case.cu_k[s]) + keys)
        own = [x[rows][None] for x, rows in zip(tensors, (q_rows, k_rows, k_rows), strict=True)]

        def alone(q, k, v):
            return U.attention(
                q, k, v, causal=causal, softcap=2.0, layout="bthd", return_lse=True,
                implementation="kernel",
            )  # fmt: skip

        given = [cotangents[0][None, q_rows], cotangents[1][None, :, q_rows]]
        found = testing.run(alone, own, given)
        assert torch.equal(found.outputs[0][0], packed.outputs[0][q_rows])
        assert torch.equal(found.outputs[1][0], packed.outputs[1][:, q_rows])
        for own_gradient, gradient, rows in zip(
            found.gradients, packed.gradients, (q_rows, k_rows, k_rows), strict=True
        ):
            assert torch.equal(own_gradient[0], gradient[rows])


def test_nan_stays_in_its_sequence(backend):
    case = _Case(backend)
    clean = testing.run(*case.function(_kernel))
    case.tensors[1][int(case.cu_k[2])] = math.nan
    case.tensors[2][int(case.cu_k[2])] = math.inf
    found = testing.run(*case.function(_kernel))
    rows = slice(int(case.cu_q[2]), int(case.cu_q[3]))
    assert bool(found.outputs[0][rows].isnan().all())
    for ours, theirs, cu in (
        (found.outputs[0], clean.outputs[0], case.cu_q),
        *zip(found.gradients, clean.gradients, (case.cu_q, case.cu_k, case.cu_k), strict=True),
    ):
        assert torch.equal(ours[: int(cu[2])], theirs[: int(cu[2])])
        assert torch.equal(ours[int(cu[3]) :], theirs[int(cu[3]) :])


def test_strided_views(backend, dtype):
    """q, k and v as parts of one buffer, with numbers that are not theirs around them."""
    case = _Case(backend, dtype, lengths=[(5, 5), (17, 17), (2, 2)], heads=(2, 2, 6, 6))
    buffer = torch.full((24 + 2, 3, 2, 6 + 3), math.nan, dtype=dtype, device=case.device)
    views = [buffer[1:-1, i, :, 1:7] for i in range(3)]
    for view, tensor in zip(views, case.tensors, strict=True):
        view.copy_(tensor)
    expected = _kernel(*case.tensors, case.cu_q, case.cu_k)
    assert torch.equal(_kernel(*views, case.cu_q, case.cu_k), expected)
    assert torch.equal(_kernel(*views, case.cu_q.int(), case.cu_k.int()), expected)


def test_deterministic(backend):
    case = _Case(backend)
    assert_deterministic(*case.function(_kernel, causal="bottom_right", return_lse=True))


def test_one_long_sequence_among_short_ones(backend):
    """Its parts are shared out to threads, with the bits of one thread."""
    lengths = [(3, 3)] * 4 + ([(20, 40)] if backend.small else [(700, 900)]) + [(5, 2)] * 4
    case = _Case(backend, lengths=lengths)
    assert_deterministic(*case.function(_kernel, causal="bottom_right"))
    case.compare(causal="bottom_right")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler):
    class Cpu:
        device, small = "cpu", False

    cases = [_Case(Cpu, lengths=[(5, 7), (20, 9)]), _Case(Cpu, lengths=[(2, 8), (31, 17)])]

    def call(q, k, v, cu_q, cu_k):
        return _kernel(q, k, v, cu_q, cu_k, causal="bottom_right")

    sets = [[*case.tensors, case.cu_q, case.cu_k] for case in cases]
    ops = ("attention_varlen_fwd", "attention_varlen_bwd")
    assert_compiles(call, sets[: 1 + (compiler == "aot_eager")], ops, compiler,
                    dynamic=compiler == "aot_eager")  # fmt: skip


def test_opcheck(backend):
    case = _Case(backend, lengths=[(5, 7), (0, 2), (3, 3)])
    sinks = testing.make((case.h,), device=case.device)
    q, k, v = case.tensors
    options = (1, 2**62, 0, 0.3, 0.0, 0.0, None)
    op = torch.ops.udlkernels
    args = (q, k, v, case.cu_q, case.cu_k, None, sinks, *options)
    assert_opcheck(op.attention_varlen_fwd, args)
    out, lse = op.attention_varlen_fwd(*args)
    rest = (q, k, v, out, lse, case.cu_q, case.cu_k, None, sinks, *options)
    assert_opcheck(op.attention_varlen_bwd, (out, None, *rest, True, True, True))
    assert_opcheck(op.attention_varlen_bwd, (out, lse, *rest, False, True, False))


def test_double_backward(backend):
    if backend.small:
        pytest.skip("the formula's second gradient needs no kernel, and float64 is not interpreted")
    case = _Case(backend, torch.float64, lengths=[(2, 3), (3, 2)], heads=(2, 1, 3, 2))
    leaves = [t.requires_grad_() for t in case.tensors]
    kernel, _ = case.function(_kernel, causal="bottom_right")
    assert torch.autograd.gradcheck(kernel, leaves)
    assert torch.autograd.gradgradcheck(kernel, leaves)


BAD = {
    "start": (dict(cu_q=[1, 3, 6]), "cu_seqlens_q: expected 0, then ends"),
    "order": (dict(cu_k=[0, 5, 4]), "cu_seqlens_k: expected 0, then ends"),
    "end": (dict(cu_k=[0, 5, 9]), "up to 8"),
    "count": (dict(cu_k=[0, 8]), "cu_seqlens_k: expected 3 values"),
    "type": (dict(cu_q=[0.0, 3.0, 6.0]), "cu_seqlens_q: expected int32 or int64"),
    "empty": (dict(cu_q=[]), "cu_seqlens_q: expected int32 or int64"),
    "causal": (dict(causal="left"), "causal: expected one of"),
    "window": (dict(window=(-1, 2)), "window: expected"),
    "dropout_p": (dict(dropout_p=1.5), "dropout_p: expected"),
    "heads": (dict(q=(6, 3, 4)), "k: expected heads that divide"),
    "width": (dict(q=(6, 4, 5)), "k: expected width 5"),
    "rows": (dict(v=(7, 2, 4)), "v: expected 8 rows"),
    "rank": (dict(q=(1, 6, 4, 4)), "q: expected 3 dimensions"),
    "slopes": (dict(alibi_slopes=torch.ones(3)), "alibi_slopes: expected"),
    "sinks": (dict(sinks=torch.ones(2)), "sinks: expected"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_bad_input(name, implementation):
    changes, message = BAD[name]
    changes = dict(changes)
    shapes = dict(q=(6, 4, 4), k=(8, 2, 4), v=(8, 2, 4))
    q, k, v = (torch.zeros(changes.pop(n, shape)) for n, shape in shapes.items())
    cu_q, cu_k = (
        torch.tensor(changes.pop(n, ends)) for n, ends in (("cu_q", [0, 2, 6]), ("cu_k", [0, 5, 8]))
    )
    with pytest.raises(ArgumentError, match=r"\[attention_varlen\] .*") as caught:
        U.attention_varlen(q, k, v, cu_q, cu_k, **changes, implementation=implementation)
    assert message in str(caught.value)


def test_ends_that_are_not_checked_raise_in_the_kernel():
    """As compiled code hands them on."""
    case_q, case_k = torch.zeros(6, 4, 4), torch.zeros(8, 2, 4)
    for ends in ([0, 5, 9], [1, 5, 8], [0, 6, 5], [-3, 0, 8]):
        cu_k = torch.tensor(ends)
        args = (torch.tensor([0, 2, 6]), cu_k, None, None, 0, 2**62, 2**62, 0.5, 0.0, 0.0, None)
        with pytest.raises(RuntimeError):
            torch.ops.udlkernels.attention_varlen_fwd(case_q, case_k, case_k, *args)
