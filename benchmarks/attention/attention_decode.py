"""attention_decode: one or a few new tokens over a cache of keys and values."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Cost, Input, Peer, Shape


def inputs(shape: Shape) -> Mapping[str, Input]:
    """The shape is that of the cache [B, S, Hkv, D], which is full."""
    batch, _, _, width = shape.size
    query = (batch, shape.options["queries"], shape.options["heads"], width)
    sizes = {"k_cache": shape.size, "v_cache": shape.size, "q": query}
    return {name: Input(size, grad=False) for name, size in sizes.items()}


def run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, implementation: str, heads: int, queries: int
) -> Any:
    return functional.attention_decode(
        q, k_cache, v_cache, cache_seqlens=k_cache.shape[1], implementation=implementation
    )


@functools.cache
def _seen(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def eager(q: Tensor, k_cache: Tensor, v_cache: Tensor, heads: int, queries: int) -> Any:
    mask = None if queries == 1 else _seen(queries, k_cache.shape[1], q.device)
    out = torch_functional.scaled_dot_product_attention(
        q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), mask, enable_gqa=True
    )
    return out.transpose(1, 2)


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """The cache read once; two products."""
    batch, keys, _, width = shape.size
    rows = batch * shape.options["queries"] * shape.options["heads"]
    moved = 2 * (shape.numel + rows * width) * dtype.itemsize
    return Cost(moved, 0, 4 * rows * keys * width)


def _shape(name: str, size: tuple[int, ...], heads: int, queries: int = 1, **rest: Any) -> Shape:
    return Shape(name, size, options={"heads": heads, "queries": queries}, **rest)


BENCHMARK = Benchmark(
    op="attention_decode",
    family="attention",
    shapes=(
        _shape("gpt2-2k", (1, 2048, 12, 64), 12, quick=True),
        _shape("gpt2-8k", (1, 8192, 12, 64), 12),
        _shape("gpt2-32k", (1, 32768, 12, 64), 12),
        _shape("gpt2-draft-of-8", (1, 8192, 12, 64), 12, 8),
        _shape("llama3-8b-2k", (1, 2048, 8, 128), 32),
        _shape("llama3-8b-8k", (1, 8192, 8, 128), 32),
        _shape("llama3-8b-batch", (8, 2048, 8, 128), 32),
        _shape("llama3-8b-draft-of-4", (1, 4096, 8, 128), 32, 4),
        _shape("tiny", (1, 8, 2, 8), 2, group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager, compiled=False),),
    cost=cost,
    reduction=lambda shape: shape.size[1] + 2 * shape.size[3],
    traffic="read",
)
