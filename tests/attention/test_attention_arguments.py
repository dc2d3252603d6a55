"""attention: which implementation serves a call, and what its arguments may be."""

from __future__ import annotations

import math

import pytest
import torch

import udlkernels
from udlkernels import functional as U
from udlkernels import testing
from udlkernels.attention.attention import reference


def _inputs():
    return [testing.make((2, 4, rows, 8), seed=rows) for rows in (5, 7, 7)]


def test_wide_heads_go_to_the_formula():
    q, k, v = (torch.randn(1, 1, 3, 513) for _ in range(3))
    (choice,) = udlkernels.explain(U.attention, q, k, v).choices
    assert choice.implementation == "reference" and "513" in str(choice)
    (choice,) = udlkernels.explain(U.attention, *(t[..., :512] for t in (q, k, v))).choices
    assert choice.implementation == "kernel"


def test_gradient_of_slopes_comes_from_the_formula():
    q, k, v = _inputs()
    slopes = torch.rand(4, requires_grad=True)
    U.attention(q, k, v, alibi_slopes=slopes).sum().backward()
    assert slopes.grad.any()
    with pytest.raises(udlkernels.ArgumentError, match="alibi_slopes needs a gradient"):
        U.attention(q, k, v, alibi_slopes=slopes, implementation="kernel")


def test_autocast_and_transforms():
    q, k, v = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = U.attention(q, k, v)
    assert torch.equal(out, U.attention(*(t.bfloat16() for t in (q, k, v))))
    by_sample = torch.func.vmap(lambda *t: U.attention(*(x[None] for x in t))[0])(q, k, v)
    testing.check(by_sample, reference.attention(q.double(), k.double(), v.double()), [out])


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
        (dict(v=torch.ones(2, 1, 6, 5)), r"v: expected 2 heads of 6 rows \(k's\)"),
        (dict(layout="bhdt"), "layout: expected 'bhtd' or 'bthd', got 'bhdt'"),
        (dict(layout="bthd"), "k: expected"),
        (dict(causal=True), "causal: expected one of"),
        (dict(window=3), r"window: expected a pair \(left, right\)"),
        (dict(window=(-1, 2)), "window: expected integers >= 0 or None"),
        (dict(window=(1, 0.5)), "window: expected integers >= 0 or None"),
        (dict(mask=torch.ones(3, 6)), r"mask: expected bool .* \(a float mask is a bias\), got"),
        (dict(mask=torch.ones(3, 5) > 0), r"mask: expected bool that broadcasts .* \[2, 4, 3, 6\]"),
        (dict(bias=torch.ones(3, 6) > 0), "bias: expected floating point that broadcasts"),
        (dict(bias=torch.ones(3, 1, 3, 6)), "bias: expected floating point that broadcasts"),
        (dict(bias=torch.ones(6, device="meta")), "bias: expected a tensor on cpu"),
        (dict(key_lengths=torch.tensor([1])), r"key_lengths: expected int32 or int64, shape \[2\]"),
        (dict(key_lengths=torch.ones(2)), "key_lengths: expected int32 or int64"),
        (dict(key_lengths=torch.tensor([-1, 3])), "key_lengths: expected lengths from 0 to 6"),
        (dict(key_lengths=torch.tensor([1, 7])), "key_lengths: .* got 1 to 7"),
        (dict(alibi_slopes=torch.ones(2)), r"alibi_slopes: expected .* \[4\] or \[2, 4\]"),
        (dict(sinks=torch.ones(2)), r"sinks: expected floating point, shape \[4\]"),
        (dict(softcap=-1.0), "softcap: expected None or a finite number >= 0"),
        (dict(scale=math.nan), "scale: expected None or a finite number"),
        (dict(dropout_p=1.5), r"dropout_p: expected a probability in \[0, 1\]"),
        (dict(dropout_p=0.5, seed=torch.ones(1)), "seed: expected an int64 tensor of one value"),
        (dict(implementation="fast"), "implementation: expected one of"),
        (dict(implementation="torch"), "PyTorch has no such op"),
        (
            dict(k=torch.ones(2, 2, 0, 5), v=torch.ones(2, 2, 0, 5), implementation="kernel"),
            "no el",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input(change, message):
    tensors = dict(q=torch.ones(2, 4, 3, 5), k=torch.ones(2, 2, 6, 5), v=torch.ones(2, 2, 6, 5))
    with pytest.raises(udlkernels.ArgumentError, match=message) as error:
        U.attention(**(tensors | change))
    assert str(error.value).startswith("[attention] ")
