"""attention_decode: values, pages, appended keys, options, bits, compilation."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import assert_compiles, assert_deterministic, assert_opcheck
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.attention.attention_decode import reference

# H, Hkv, T, D, Dv
HEADS = [
    (4, 4, 1, 8, 8),
    (4, 2, 3, 16, 5),
    (8, 1, 8, 33, 64),
    (2, 2, 2, 128, 1),
    (24, 4, 5, 12, 20),
]
LENGTHS = (0, 1, 5, 511, 512, 513, 1030)
CAPACITY = 1100
# The same, for the interpreter.
SMALL_HEADS, SMALL_LENGTHS = [(4, 2, 3, 8, 6), (2, 2, 1, 5, 7)], (0, 1, 513)
ROTARIES = {"halves": (False, 3), "pairs": (True, 2), "whole": (False, 4)}
OPTIONS = {
    "not_causal": lambda heads, device: dict(causal=None),
    "window": lambda heads, device: dict(window=(6, None)),
    "window_ahead": lambda heads, device: dict(window=(300, 1), causal=None),
    "alibi_slopes": lambda heads, device: dict(
        alibi_slopes=0.5 ** torch.arange(1.0, heads + 1).to(device)
    ),
    "softcap": lambda heads, device: dict(softcap=1.5),
    "sinks": lambda heads, device: dict(sinks=testing.make((heads,), device=device, seed=5)),
    "scale": lambda heads, device: dict(scale=-0.3),
}


class _Case:
    """Queries, caches and new keys of samples with the given lengths before the new keys."""

    def __init__(
        self, backend, dtype=torch.float32, heads=(4, 2, 3, 8, 6), lengths=(0, 7, 513), new=0,
        capacity=None,
    ):  # fmt: skip
        h, hkv, t, d, dv = heads
        self.device, self.batch, self.heads = backend.device, len(lengths), heads
        self.capacity = capacity or max(lengths) + new + 3
        shapes = [
            (self.batch, t, h, d), (self.batch, self.capacity, hkv, d),
            (self.batch, self.capacity, hkv, dv), (self.batch, new, hkv, d),
            (self.batch, new, hkv, dv),
        ]  # fmt: skip
        self.tensors = [
            testing.make(shape, dtype, device=backend.device, seed=seed) if shape[1] else None
            for seed, shape in enumerate(shapes)
        ]
        self.lengths = torch.tensor(lengths, device=backend.device)

    def rotary(self, interleaved, half):
        angles = torch.arange(self.capacity)[:, None] * 0.7 ** torch.arange(1.0, half + 1)
        tables = (angles.cos().to(self.device), angles.sin().to(self.device))
        return (*tables, interleaved)

    def options(self, name):
        return OPTIONS[name](self.heads[0], self.device)

    def pages(self, page_size, spare=2, filler=math.nan):
        """The caches cut into pages in mixed order, among pages that nobody uses; block table."""
        used = -(-self.capacity // page_size)
        generator = torch.Generator().manual_seed(page_size)
        order = torch.randperm(self.batch * used + spare, generator=generator)
        table = order[: self.batch * used].view(self.batch, used).to(self.device)
        paged = []
        for cache in self.tensors[1:3]:
            padded = cache.new_full((self.batch, used * page_size, *cache.shape[2:]), filler)
            padded[:, : self.capacity] = cache
            pages = cache.new_full((len(order), page_size, *cache.shape[2:]), filler)
            pages[table] = padded.unflatten(1, (used, page_size))
            paged.append(pages)
        return *paged, table


def _call(function, lengths, **options):
    """The function of (q, caches, new keys); gives out, lse and the caches, which are copies."""

    def call(q, k_cache, v_cache, k_new=None, v_new=None, cos=None, sin=None):
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        more = dict(options)
        if cos is not None:
            more["rotary"] = (cos, sin, options["rotary"])
        out, lse = function(
            q, k_cache, v_cache, cache_seqlens=lengths, k_new=k_new, v_new=v_new, return_lse=True,
            **more,
        )  # fmt: skip
        return out, lse, k_cache, v_cache

    return call


def _kernel(*args, **options):
    return U.attention_decode(*args, **options, implementation="kernel")


def _compare(case, tensors=None, rotary=None, **options):
    """The kernel against the formula; returns out, lse and the caches."""
    tensors = list(case.tensors if tensors is None else tensors)
    if rotary is not None:
        tensors += rotary[:2]
        options["rotary"] = rotary[2]
    formula = _call(reference.attention_decode, case.lengths, **options)
    kernel = _call(_kernel, case.lengths, **options)
    *_, d, dv = case.heads
    found = testing.compare(
        kernel, formula, [formula], tensors, gradients=False, reduction=d + dv + case.capacity
    )
    return found.outputs


def test_values(every_backend, dtype):
    for heads in SMALL_HEADS if every_backend.small else HEADS:
        lengths = SMALL_LENGTHS if every_backend.small else LENGTHS
        case = _Case(every_backend, dtype, heads, lengths)
        out, lse, *_ = _compare(case)
        assert not out[0].any() and (lse[0] == -math.inf).all()


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(backend, dtype, option):
    for heads in SMALL_HEADS[:1] if backend.small else HEADS:
        case = _Case(backend, dtype, heads, (2, 9, 520))
        _compare(case, **case.options(option))


@pytest.mark.parametrize("new", [0, 2, 3, 5])
def test_all_options_at_once(backend, dtype, new):
    """Fewer, as many and more new keys than queries."""
    case = _Case(backend, dtype, (4, 2, 3, 8, 6), (0, 9, 510), new)
    options = {}
    for name in OPTIONS:
        options |= case.options(name)
    _compare(case, rotary=case.rotary(True, 3), **options)


@pytest.mark.parametrize("rotary", ROTARIES)
def test_rotary(backend, dtype, rotary):
    for new in (0, 3):
        case = _Case(backend, dtype, (4, 2, 3, 8, 6), (1, 9, 70), new)
        _compare(case, rotary=case.rotary(*ROTARIES[rotary]))


def test_rotary_turns_pairs_by_their_angle(backend):
    """Scores of rotated vectors depend on the distance alone, in both orders of the pairs."""
    case = _Case(backend, heads=(2, 2, 1, 8, 8), lengths=(0,), new=40)
    q, k, v, k_new, v_new = case.tensors
    k_new[:] = k_new[:, :1]  # the same key everywhere
    for interleaved in (False, True):
        rotary = case.rotary(interleaved, 4)
        scores = []
        for length in (8, 20, 40):
            _, lse = _kernel(
                q, k.clone(), v.clone(), cache_seqlens=0, k_new=k_new[:, :length],
                v_new=v_new[:, :length], rotary=rotary, window=(4, None), return_lse=True,
            )  # fmt: skip
            scores.append(lse)
        for lse in scores[1:]:
            testing.check(lse, scores[0], [], reduction=case.capacity)


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("new", [0, 3])
def test_pages_give_the_bits_of_one_cache(backend, dtype, page_size, new):
    if backend.small:
        case = _Case(backend, dtype, SMALL_HEADS[0], (0, 30, 514), new)
    else:
        case = _Case(backend, dtype, (4, 2, 3, 16, 12), LENGTHS, new, CAPACITY)
    q, _, _, k_new, v_new = case.tensors
    rotary = case.rotary(False, 3)
    options = dict(window=(600, None), sinks=case.options("sinks")["sinks"])
    expected = _compare(case, rotary=rotary, **options)
    *paged, table = case.pages(page_size)
    for kind in (torch.int32, torch.int64):
        found = _compare(
            case, [q, *paged, k_new, v_new], rotary, block_table=table.to(kind), **options
        )
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        for pages, cache in zip(found[2:], expected[2:], strict=True):
            gathered = pages[table].flatten(1, 2)[:, : case.capacity]
            assert torch.equal(gathered, cache)


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
def test_new_keys_are_written_in_place_and_nothing_else(backend, dtype, layout):
    """Into slices of larger buffers, contiguous and paged, the rows that torch would write."""
    case = _Case(backend, dtype, lengths=(0, 5, 9), new=4)
    q, k, v, k_new, v_new = case.tensors
    for paged in (False, True):
        caches, table = (k, v), None
        if paged:
            *caches, table = case.pages(4, filler=0.5)
        buffers = [c.new_full([n + 2 for n in c.shape], 7.0) for c in caches]
        views = [b[1:-1, 1:-1, 1:-1, 1:-1] for b in buffers]
        for view, cache in zip(views, caches, strict=True):
            view.copy_(cache)
        expected = [b.clone() for b in buffers]
        for buffer, new in zip(expected, (k_new, v_new), strict=True):
            for b, length in enumerate(case.lengths.tolist()):
                for t in range(4):
                    at = (b, length + t)
                    if table is not None:
                        at = (int(table[b, at[1] // 4]), at[1] % 4)
                    buffer[1 + at[0], 1 + at[1], 1:-1, 1:-1] = new[b, t]
        given = [q, *views, k_new, v_new]
        if layout == "bhtd":
            given = [t.transpose(1, 2) for t in given]
        versions = [t._version for t in given[1:3]]
        _kernel(
            *given[:3], cache_seqlens=case.lengths, block_table=table, k_new=given[3],
            v_new=given[4], layout=layout,
        )  # fmt: skip
        assert all(t._version > old for t, old in zip(given[1:3], versions, strict=True))
        for buffer, wanted in zip(buffers, expected, strict=True):
            assert torch.equal(buffer, wanted)


def test_as_attention_on_the_keys_alone(backend, dtype):
    case = _Case(backend, dtype, (4, 2, 3, 8, 6), (3, 9, 70))
    q, k, v = (t.transpose(1, 2) for t in case.tensors[:3])
    options = dict(window=(20, None), softcap=2.0) | case.options("alibi_slopes")
    out = _kernel(q, k, v, cache_seqlens=case.lengths, layout="bhtd", **options)
    for b, length in enumerate(case.lengths.tolist()):
        alone = [q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length]]
        options["causal"] = "bottom_right"
        peer = U.attention(*alone, **options, implementation="reference")
        exact = U.attention(*(t.double() for t in alone), **options, implementation="reference")
        testing.check(out[b : b + 1], exact, [peer], reduction=length)


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
def test_layouts_and_lengths_of_every_kind(backend, layout):
    case = _Case(backend, lengths=(9, 9), new=3)
    expected = _call(_kernel, case.lengths)(*case.tensors)
    turned = [t.transpose(1, 2).contiguous() for t in case.tensors]
    for lengths in (9, case.lengths.int(), case.lengths.repeat_interleave(2)[::2]):
        for strided in ("contiguous", "sliced"):
            tensors = case.tensors if layout == "bthd" else turned
            tensors = [testing.lay_out(t, strided) for t in tensors]
            out, lse, *_ = _call(_kernel, lengths, layout=layout)(*tensors)
            assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
            assert torch.equal(out if layout == "bthd" else out.transpose(1, 2), expected[0])
            assert torch.equal(lse, expected[1])
    last = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in case.tensors[:3]]
    found = _kernel(*last, cache_seqlens=case.lengths)
    assert torch.equal(found, _kernel(*case.tensors[:3], cache_seqlens=case.lengths))


def test_bits_depend_on_neither_batch_nor_capacity(backend, dtype):
    lengths = (3, 514, 9) if backend.small else (3, 700, 512, 1030, 9)
    case = _Case(backend, dtype, lengths=lengths, new=2)
    options = dict(window=(530, None), rotary=True)
    tables = case.rotary(True, 3)[:2]
    whole = _call(_kernel, case.lengths, **options)(*case.tensors, *tables)
    for b, length in enumerate(lengths):
        for capacity in (length + 2, case.capacity):
            alone = [None if t is None else t[b : b + 1] for t in case.tensors]
            alone[1:3] = [t[:, :capacity] for t in alone[1:3]]
            found = _call(_kernel, case.lengths[b : b + 1], **options)(*alone, *tables)
            assert torch.equal(found[0], whole[0][b : b + 1])
            assert torch.equal(found[1], whole[1][b : b + 1])


def test_same_bits_at_any_thread_count(dtype_any):
    class Cpu:
        device = "cpu"

    for heads, lengths in (((4, 2, 3, 16, 12), LENGTHS), ((2, 1, 1, 32, 32), (3000,))):
        case = _Case(Cpu, dtype_any, heads, lengths, 2)
        assert_deterministic(_call(_kernel, case.lengths), case.tensors, gradients=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_what_no_query_sees_leaves_no_trace(backend, dtype, bad):
    """Behind the lengths, in front of the windows, in pages of nobody: the bits of zeros there."""
    case = _Case(backend, dtype, lengths=(0, 30, 514))
    q, k, v = case.tensors[:3]
    results = []
    for filler in (0.0, bad):
        for cache in (k, v):
            for b, length in enumerate(case.lengths.tolist()):
                cache[b, length:] = filler
                cache[b, : max(length - q.shape[1] - 20, 0)] = filler
        *paged, table = case.pages(16, filler=filler)
        options = dict(window=(20, None))
        found = [*_call(_kernel, case.lengths, **options)(q, k, v)[:2]]
        found += _call(_kernel, case.lengths, block_table=table, **options)(q, *paged)[:2]
        results.append(found)
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned) and not poisoned.isnan().any()


def test_seen_nan_reaches_its_sample_alone(backend):
    case = _Case(backend, lengths=(5, 30))
    q, k, v = case.tensors[:3]
    clean = _kernel(q, k, v, cache_seqlens=case.lengths)
    v[1, 0] = math.nan
    out = _kernel(q, k, v, cache_seqlens=case.lengths)
    assert torch.equal(out[0], clean[0]) and out[1].isnan().all()


def test_values_that_are_not_checked_stay_in_bounds(backend):
    """Lengths and pages out of range, which compiled code hands on: only the caches are touched.

    The C++ kernels raise, and write nothing; those of a GPU cut what lies outside.
    """
    case = _Case(backend, lengths=(5, 30, 12), new=2)
    op = torch.ops.udlkernels
    tensors = [t.transpose(1, 2) for t in case.tensors]
    *paged, table = (t.transpose(1, 2) if t.dim() == 4 else t for t in case.pages(8, filler=0.5))
    wrong = torch.tensor([-3, 2**40, 31], device=backend.device)
    table[0, 0], table[1, 1], table[2, 0] = -7, 10**6, len(paged[0])
    for caches, pages in ((tensors[1:3], None), (paged, table)):
        buffers = [c.new_full([n + 2 for n in c.shape], math.nan) for c in caches]
        views = [b[1:-1, 1:-1, 1:-1, 1:-1] for b in buffers]
        for view, cache in zip(views, caches, strict=True):
            view.copy_(cache)
        outside = [b.isnan() for b in buffers]
        new = (*tensors[3:], wrong, pages, None, None, False)
        query = (wrong, pages, None, None, False, None, None, 2**62, 0, 0.3, 0.0, False)
        if backend.name.startswith("cpu-"):
            for call in (
                lambda: op.attention_decode_append_(*views, *new),  # noqa: B023
                lambda: op.attention_decode_fwd(tensors[0], *views, *query),  # noqa: B023
            ):
                with pytest.raises(RuntimeError):
                    call()
            for view, cache in zip(views, caches, strict=True):
                assert torch.equal(view, cache)
        else:
            op.attention_decode_append_(*views, *new)
            out, _ = op.attention_decode_fwd(tensors[0], *views, *query)
            assert out.isfinite().all() and not out[0].any()
        for buffer, kept in zip(buffers, outside, strict=True):
            assert torch.equal(buffer.isnan(), kept)


@pytest.mark.parametrize("compiler", ["aot_eager-static", "aot_eager-dynamic", "inductor-static"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_compiled(compiler, paged):
    name, shapes = compiler.split("-")

    class Cpu:
        device = "cpu"

    sets = []  # sizes that are equal in the first call are so in the second
    for heads in ((4, 2, 3, 8, 6), (4, 2, 4, 8, 6)):
        case = _Case(Cpu, heads=heads, lengths=(2, 5), new=heads[2])
        caches, table = case.tensors[1:3], None
        if paged:
            *caches, table = case.pages(2, filler=0.5)
        cos, sin, _ = case.rotary(False, 2)
        sets.append([case.tensors[0], *caches, *case.tensors[3:], case.lengths, table, cos, sin])

    def function(q, k_cache, v_cache, k_new, v_new, lengths, table, cos, sin):
        options = dict(block_table=table, rotary=False, window=(4, None))
        return _call(_kernel, lengths, **options)(q, k_cache, v_cache, k_new, v_new, cos, sin)

    ops = ("attention_decode_append_", "attention_decode_fwd")
    assert_compiles(function, sets, ops, name, shapes == "dynamic", gradients=False)


def test_compiled_code_writes_to_its_arguments():
    class Cpu:
        device = "cpu"

    case = _Case(Cpu, lengths=(2, 5), new=3)
    expected = _call(_kernel, case.lengths)(*case.tensors)

    def step(q, k_cache, v_cache, k_new, v_new):
        return _kernel(q, k_cache, v_cache, cache_seqlens=case.lengths, k_new=k_new, v_new=v_new)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out = compiled(*case.tensors)
    for found, wanted in zip((out, *case.tensors[1:3]), (expected[0], *expected[2:]), strict=True):
        assert torch.equal(found, wanted)


def test_opcheck():
    class Cpu:
        device = "cpu"

    op = torch.ops.udlkernels
    case = _Case(Cpu, lengths=(2, 5), new=3)
    cos, sin, _ = case.rotary(False, 2)
    q, k, v, k_new, v_new = (t.transpose(1, 2) for t in case.tensors)
    *paged, table = (t.transpose(1, 2) if t.dim() == 4 else t for t in case.pages(4, filler=0.5))
    slopes, sinks = torch.rand(2, 4), torch.randn(4)
    for caches, pages in (((k, v), None), (paged, table)):
        for angles in ((None, None, False), (cos, sin, True)):
            args = (*caches, k_new, v_new, case.lengths, pages, *angles)
            assert_opcheck(op.attention_decode_append_, args)
            places = q, *caches, case.lengths, pages, *angles
            plain = (None, None, 2**62, 0, 0.4, 0.0, False)
            assert_opcheck(op.attention_decode_fwd, (*places, *plain))
            assert_opcheck(
                op.attention_decode_fwd, (*places, slopes, sinks, 4, 2**62, 0.4, 2.0, True)
            )
