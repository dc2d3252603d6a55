"""attention_decode: which implementation serves a call, and what its arguments may be."""

from __future__ import annotations

import math

import pytest
import torch

import udlkernels
from udlkernels import functional as U
from udlkernels import testing


def _inputs():
    shapes = (2, 3, 4, 8), (2, 9, 2, 8), (2, 9, 2, 6), (2, 3, 2, 8), (2, 3, 2, 6)
    names = ("q", "k_cache", "v_cache", "k_new", "v_new")
    tensors = {
        name: testing.make(shape, seed=seed)
        for seed, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    return tensors | dict(cache_seqlens=torch.tensor([4, 6]))


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k_new", "v_new", "sinks"])
def test_gradients_come_from_the_formula(name):
    given = _inputs() | dict(sinks=torch.randn(4))
    leaf = given[name].requires_grad_()
    if "cache" in name:
        given |= dict(k_new=None, v_new=None)
    with pytest.raises(udlkernels.ArgumentError, match="a gradient is needed"):
        U.attention_decode(**given, implementation="kernel")
    (choice,) = udlkernels.explain(U.attention_decode, **given).choices
    assert choice.implementation == "reference"
    (gradient,) = torch.autograd.grad(U.attention_decode(**given).sum(), leaf)
    assert gradient.any()
    with torch.no_grad():
        (choice,) = udlkernels.explain(U.attention_decode, **given).choices
    assert choice.implementation == "kernel"


def test_gradcheck_of_the_formula():
    given = {name: t.double() for name, t in _inputs().items() if name[0] != "c"}
    lengths = torch.tensor([0, 6])

    def step(q, k_cache, v_cache, k_new, v_new):
        caches = k_cache.clone(), v_cache.clone()  # what needs a gradient cannot be written to
        return U.attention_decode(q, *caches, cache_seqlens=lengths, k_new=k_new, v_new=v_new)

    assert torch.autograd.gradcheck(step, [t.requires_grad_() for t in given.values()])
    given = _inputs()
    given["k_cache"].requires_grad_()
    with pytest.raises(RuntimeError, match="in-place operation"):
        U.attention_decode(**given)


def test_strided_caches_are_written_by_the_formula():
    given = _inputs()
    expected = U.attention_decode(**given, implementation="reference")
    for name in ("k_cache", "v_cache"):
        given[name] = given[name].transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(U.attention_decode(**given), expected)
    with pytest.raises(udlkernels.ArgumentError, match="last dimension is strided"):
        U.attention_decode(**given, implementation="kernel")


def test_autocast_takes_the_caches_type():
    given = _inputs()
    for name in ("k_cache", "v_cache"):
        given[name] = given[name].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = U.attention_decode(**given, implementation="reference")
    assert out.dtype == torch.bfloat16


def test_cache_of_inference_mode():
    with torch.inference_mode():
        given = _inputs()
        expected = U.attention_decode(**given, implementation="reference")
        testing.check(U.attention_decode(**given), expected, [expected], reduction=9)


@pytest.mark.parametrize("zero", ["batch", "queries", "capacity", "pages"])
def test_empty(zero):
    given = _inputs() | dict(k_new=None, v_new=None)
    if zero == "batch":
        given = {name: t if t is None else t[:0] for name, t in given.items()}
    elif zero == "queries":
        given["q"] = given["q"][:, :0]
    else:
        given |= {name: given[name][:, :0] for name in ("k_cache", "v_cache")}
        given["cache_seqlens"] = 0
    if zero == "pages":
        given["block_table"] = torch.zeros(2, 0, dtype=torch.int32)
    out, lse = U.attention_decode(**given, return_lse=True)
    assert out.shape == (*given["q"].shape[:3], 6)
    assert not out.any() and (lse == -math.inf).all()


PAGED = dict(
    block_table=torch.tensor([[1, 3, 0], [2, 4, 9]], dtype=torch.int32),
    k_cache=torch.ones(5, 4, 2, 8), v_cache=torch.ones(5, 4, 2, 6), cache_seqlens=2,
)  # fmt: skip
TABLE = torch.ones(9, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.ones(4, 3, 8)), r"q: expected 4 dimensions \[B, T, H, D\], got"),
        (dict(q=torch.ones(2, 3, 4, 8).int()), "q: expected a floating point tensor, got"),
        (dict(k_cache=torch.ones(2, 9, 2, 8).half()), r"k_cache: expected torch.float32 \(q's"),
        (dict(v_new=torch.ones(2, 3, 2, 6, device="meta")), "v_new: expected a tensor on cpu"),
        (dict(k_cache=torch.ones(3, 9, 2, 8)), r"k_cache: expected a batch of 2 \(q's\)"),
        (dict(k_cache=torch.ones(2, 9, 2, 7)), r"k_cache: expected width 8 \(q's\)"),
        (dict(k_cache=torch.ones(2, 9, 3, 8)), "k_cache: expected heads that divide q's 4"),
        (dict(v_cache=torch.ones(2, 8, 2, 6)), r"v_cache: expected \[2, 9, 2\] and a width"),
        (dict(v_new=None), "v_new: expected a tensor beside k_new, got None"),
        (dict(k_new=None), "k_new: expected a tensor beside v_new, got None"),
        (dict(k_new=torch.ones(2, 3, 2, 7)), r"k_new: expected shape \[2, 3, 2, 8\], got"),
        (dict(v_new=torch.ones(2, 2, 2, 6)), r"v_new: expected shape \[2, 3, 2, 6\], got"),
        (dict(k_cache=torch.ones(1, 9, 2, 8).expand(2, -1, -1, -1)), "elements of their own"),
        (dict(layout="bhdt"), "layout: expected 'bthd' or 'bhtd', got 'bhdt'"),
        (dict(layout="bhtd"), "k_cache: expected"),
        (dict(causal="top_left"), r"causal: expected one of \(None, 'bottom_right'\)"),
        (dict(window=(-1, 2)), "window: expected integers >= 0 or None"),
        (dict(cache_seqlens=torch.tensor([1])), r"cache_seqlens: expected .* of shape \[2\]"),
        (dict(cache_seqlens=torch.ones(2)), "cache_seqlens: expected an integer, or int32"),
        (dict(cache_seqlens=[4, 6]), r"cache_seqlens: expected .*, got \[4, 6\]"),
        (dict(cache_seqlens=torch.tensor([-1, 3])), r"cache_seqlens: expected lengths from 0 to 9"),
        (dict(cache_seqlens=torch.tensor([4, 7])), "got 4 to 7, and 3 new keys"),
        (dict(cache_seqlens=7), "got 7 to 7, and 3 new keys"),
        (dict(cache_seqlens=10, k_new=None, v_new=None), "got 10 to 10$"),
        (PAGED | dict(block_table=torch.ones(2, 3)), r"block_table: expected int32 or int64"),
        (PAGED | dict(block_table=torch.ones(3, 3).int()), r"block_table: .* shape \[2, P\]"),
        (PAGED | dict(cache_seqlens=10), "lengths from 0 to 12"),
        (PAGED | dict(cache_seqlens=torch.tensor([2, 7])), "block_table: .* pages from 0 to 4.* 9"),
        (dict(rotary=TABLE), r"rotary: expected \(cos, sin\) or"),
        (dict(rotary=(TABLE, TABLE[:, :2])), "rotary: expected floating point tables"),
        (dict(rotary=(torch.ones(9, 5),) * 2), r"R up to 8 \(q's width\)"),
        (dict(rotary=(TABLE[:8], TABLE[:8])), "rotary: expected angles of 9 positions"),
        (dict(alibi_slopes=torch.ones(2)), r"alibi_slopes: expected .* \[4\] or \[2, 4\]"),
        (dict(sinks=torch.ones(2)), r"sinks: expected floating point, shape \[4\]"),
        (dict(softcap=-1.0), "softcap: expected None or a finite number >= 0"),
        (dict(scale=math.nan), "scale: expected None or a finite number"),
        (dict(implementation="fast"), "implementation: expected one of"),
        (dict(implementation="torch"), "PyTorch has no such op"),
    ],
)
def test_bad_input_leaves_the_cache_alone(change, message):
    given = _inputs() | change
    before = {name: given[name].clone() for name in ("k_cache", "v_cache")}
    with pytest.raises(udlkernels.ArgumentError, match=message) as error:
        U.attention_decode(**given)
    assert str(error.value).startswith("[attention_decode] ")
    for name, cache in before.items():
        assert torch.equal(given[name], cache)


def test_block_table_behind_the_last_key_may_be_anything():
    U.attention_decode(**(_inputs() | PAGED), implementation="reference")
    empty = _inputs() | PAGED | dict(block_table=torch.full((2, 3), -1), cache_seqlens=0)
    empty |= dict(k_new=None, v_new=None)
    assert not U.attention_decode(**empty, implementation="reference").any()
