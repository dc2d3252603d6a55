"""Patterns of blocks: each against a definition of its own, and how they combine."""

from __future__ import annotations

import pytest
import torch

import udlkernels
from udlkernels import functional as U
from udlkernels.attention import patterns


def _grid(queries, keys, seen):
    return torch.tensor([[bool(seen(i, j)) for j in range(keys)] for i in range(queries)])


# A pattern of n blocks (of n by m where it takes m), and whether block i sees block j.
DEFINITIONS = {
    "full": (patterns.full, (), lambda i, j: True),
    "causal": (patterns.causal, (), lambda i, j: j in range(i + 1)),
    "convolutional": (patterns.convolutional, (5,), lambda i, j: j in range(i - 2, i + 3)),
    "dilated": (patterns.dilated, (5, 3), lambda i, j: j in (i - 6, i - 3, i, i + 3, i + 6)),
    "selected_tokens": (patterns.selected_tokens, ((1, 6),), lambda i, j: {i, j} & {1, 6}),
    "global_tokens": (patterns.global_tokens, (2,), lambda i, j: min(i, j) < 2),
    "local": (patterns.local, (3, 1), lambda i, j: j in range(i - 3, i + 2)),
    "strided": (
        patterns.strided,
        (4,),
        lambda i, j: j in [*range(i - 3, i + 1), *range(i, -1, -4)],
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize(("queries", "keys"), [(11, None), (7, 13), (13, 7), (1, 1)])
def test_each_pattern(name, queries, keys):
    make, arguments, seen = DEFINITIONS[name]
    pattern = make(queries, *arguments, n_key_blocks=keys)
    wanted = _grid(queries, keys or queries, seen)
    assert pattern.mask.dtype == torch.bool and torch.equal(pattern.mask, wanted)
    assert pattern.density == wanted.double().mean().item()


def test_every_pattern_is_defined_here():
    assert {*DEFINITIONS, "random", "Pattern"} == set(patterns.__all__)


def test_random():
    pattern = patterns.random(20, 3, seed=5, n_key_blocks=30)
    assert pattern.mask.shape == (20, 30) and (pattern.mask.sum(1) == 3).all()
    assert torch.equal(pattern.mask, patterns.random(20, 3, 5, 30).mask)
    assert not torch.equal(pattern.mask, patterns.random(20, 3, 6, 30).mask)
    assert patterns.random(4, 9, seed=0).density == 1.0


def test_combinations():
    one, other = patterns.causal(5), patterns.local(5, 1, 1)
    assert torch.equal((one & other).mask, one.mask & other.mask)
    assert torch.equal((one | other).mask, one.mask | other.mask)
    assert torch.equal((~one).mask, ~one.mask)
    with pytest.raises(udlkernels.ArgumentError, match=r"expected \[5, 5\] blocks"):
        one | patterns.causal(4)


def test_drawn():
    assert repr(patterns.causal(3)) == "3 x 3 blocks, 67% seen\n#..\n##.\n###"
    assert repr(patterns.full(1, 2)) == "1 x 2 blocks, 100% seen\n##"


def test_attention_takes_them():
    q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
    pattern = patterns.dilated(6, 3, 2) & patterns.causal(6) | patterns.global_tokens(6, 1)
    out = U.block_sparse_attention(q, k, v, pattern.mask, block_size=2, implementation="reference")
    wide = pattern.mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(out, U.attention(q, k, v, mask=wide, implementation="reference"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patterns.causal(-1), "n_query_blocks: expected an integer >= 0"),
        (lambda: patterns.causal(3, -1), "n_key_blocks: expected an integer >= 0"),
        (lambda: patterns.convolutional(4, 2), "width: expected an odd number, got 2"),
        (lambda: patterns.dilated(4, 3, 0), "dilation: expected an integer >= 1"),
        (lambda: patterns.selected_tokens(4, (1, -1)), "blocks: expected an integer >= 0"),
        (lambda: patterns.global_tokens(4, 1.5), "count: expected an integer >= 0"),
        (lambda: patterns.local(4, -1, 2), "before: expected an integer >= 0"),
        (lambda: patterns.strided(4, 0), "stride: expected an integer >= 1"),
        (lambda: patterns.random(4, -1, 0), "per_row: expected an integer >= 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(udlkernels.ArgumentError, match=message):
        make()
