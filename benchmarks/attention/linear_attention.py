"""linear_attention: the Linear Transformer on long sequences, a decoder, vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udlkernels import functional

from ..declaration import Benchmark, Cost, Input, Peer, Shape

_CAUSAL = {"causal": True}
_CHUNK = 64


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {name: Input(shape.size) for name in ("q", "k", "v")}


def run(q: Tensor, k: Tensor, v: Tensor, implementation: str, causal: bool = False) -> Any:
    return functional.linear_attention(q, k, v, causal=causal, implementation=implementation)


def _features(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Any:
    """Two products over all keys; with a causal mask the weights of all pairs."""
    q, k = _features(q), _features(k)
    if causal:
        weights = (q @ k.mT).tril()
        return weights @ v / weights.sum(-1, keepdim=True)
    return q @ (k.mT @ v) / (q @ k.sum(2)[..., None])


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Products with the state and, with a causal mask, of chunks: 2 and 2, in the backward 5 and 7.

    The backward with a causal mask sums the state again.
    """
    batch, heads, length, width = shape.size
    size = shape.numel * dtype.itemsize
    state = 2 * batch * heads * length * width * width
    if not shape.options.get("causal"):
        return Cost(4 * size, 7 * size, 2 * state, 5 * state)
    chunk = 2 * batch * heads * length * width * (min(_CHUNK, length) + 1) // 2
    return Cost(4 * size, 7 * size, 2 * state + 2 * chunk, 5 * state + state + 7 * chunk)


BENCHMARK = Benchmark(
    op="linear_attention",
    family="attention",
    shapes=(
        Shape("linear-transformer-1k", (1, 8, 1024, 64), options=_CAUSAL, quick=True),
        Shape("linear-transformer-4k", (1, 8, 4096, 64), options=_CAUSAL),
        Shape("linear-transformer-1k-full", (1, 8, 1024, 64)),
        Shape("linear-transformer-4k-full", (1, 8, 4096, 64)),
        Shape("linear-transformer-16k-full", (1, 8, 16384, 64)),
        Shape("gpt2", (2, 12, 1024, 64), options=_CAUSAL),
        Shape("vit-base", (8, 12, 197, 64), quick=True),
        Shape("vit-base-512px", (2, 12, 1024, 64)),
        Shape("tiny", (1, 2, 8, 8), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager, compiled=True),),
    cost=cost,
    fused=True,
    reduction=lambda shape: shape.size[-2] + 2 * shape.size[-1],
)
