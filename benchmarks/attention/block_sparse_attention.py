"""block_sparse_attention: the patterns of long sequences, beside a mask of all tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional
from udlkernels.attention import patterns

from ..declaration import Benchmark, Cost, Input, Peer, Shape
from .shapes import products, terms

# Of n blocks, by name.
_PATTERNS = {
    "longformer": lambda n: patterns.local(n, 4, 4) | patterns.global_tokens(n, 1),
    "bigbird": lambda n: (
        patterns.local(n, 1, 1) | patterns.global_tokens(n, 1) | patterns.random(n, 2, seed=0)
    ),
    "strided": lambda n: patterns.strided(n, 8),
    "dilated": lambda n: patterns.dilated(n, 9, 2) & patterns.causal(n),
    "sparse": lambda n: patterns.random(n, max(n // 10, 1), seed=0),
    "full": patterns.full,
}


@functools.cache
def _mask(pattern: str, length: int, size: int, device: torch.device) -> Tensor:
    return _PATTERNS[pattern](-(-length // size)).mask.to(device)


@functools.cache
def _wide(pattern: str, length: int, size: int, causal: str | None, device: torch.device) -> Tensor:
    """The same as a mask of tokens."""
    mask = _mask(pattern, length, size, device)
    mask = mask.repeat_interleave(size, 0).repeat_interleave(size, 1)[:length, :length]
    return mask.tril() if causal else mask


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {name: Input(shape.size) for name in ("q", "k", "v")}


def run(
    q: Tensor, k: Tensor, v: Tensor, implementation: str, pattern: str, block_size: int = 64,
    causal: str | None = None,
) -> Any:  # fmt: skip
    mask = _mask(pattern, q.shape[2], block_size, q.device)
    return functional.block_sparse_attention(
        q, k, v, mask, block_size=block_size, causal=causal, implementation=implementation
    )


def eager(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, block_size: int = 64, causal: str | None = None
) -> Any:
    mask = _wide(pattern, q.shape[2], block_size, causal, q.device)
    return torch_functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dense(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, block_size: int = 64, causal: str | None = None
) -> Any:
    """Our attention over all the scores."""
    return functional.attention(q, k, v, causal=causal)


def dense_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    causal = shape.options.get("causal") is not None
    return products(replace(shape, options={"is_causal": causal}), dtype)


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Two products forward, five backward, over the scores that are seen."""
    options = shape.options
    size, device = options.get("block_size", 64), torch.device("cpu")
    wide = _wide(options["pattern"], shape.size[2], size, options.get("causal"), device)
    batch, heads, _, width = shape.size
    product = 2 * batch * heads * width * int(wide.sum())
    moved = shape.numel * dtype.itemsize
    return Cost(4 * moved, 8 * moved, 2 * product, 5 * product)


_CAUSAL = {"causal": "top_left"}

BENCHMARK = Benchmark(
    op="block_sparse_attention",
    family="attention",
    shapes=(
        Shape("longformer", (1, 12, 4096, 64), options={"pattern": "longformer"}),
        Shape("bigbird", (1, 12, 4096, 64), options={"pattern": "bigbird"}),
        Shape(
            "random-tenth", (1, 12, 4096, 64), options={"pattern": "sparse"}, tags=("tenth",)
        ),
        Shape("sparse-transformer", (1, 8, 4096, 64), options={"pattern": "strided", **_CAUSAL}),
        Shape("dilated-decoder", (1, 8, 2048, 128), options={"pattern": "dilated", **_CAUSAL}),
        Shape(
            "bigbird-short", (1, 12, 1024, 64),
            options={"pattern": "bigbird", "block_size": 32}, quick=True,
        ),
        Shape("full", (1, 12, 1024, 64), options={"pattern": "full"}, quick=True),
        Shape(
            "tiny", (1, 2, 8, 8), group="overhead", options={"pattern": "full", "block_size": 4},
            quick=True,
        ),
    ),
    inputs=inputs,
    run=run,
    peers=(
        Peer("eager", eager, compiled=False),
        Peer("dense (ours)", dense, compiled=False, cost=dense_cost),
    ),
    cost=cost,
    reduction=terms,
)  # fmt: skip
