"""attention with a learned bias: relative positions of T5 and Swin, pairs of AlphaFold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import products, terms

# Where PyTorch's path has scores that weigh more than queries, keys and values.
_LONG = ("T>=256",)


def inputs(shape: Shape) -> Mapping[str, Input]:
    _, heads, length, _ = shape.size
    found = {name: Input(shape.size) for name in ("q", "k", "v")}
    return found | {"bias": Input((1, heads, length, length), "small")}


def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, implementation: str) -> Any:
    return functional.attention(q, k, v, bias=bias, implementation=implementation)


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return torch_functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


BENCHMARK = Benchmark(
    op="attention",
    family="attention",
    shapes=(
        Shape("t5-base", (2, 12, 512, 64), tags=_LONG, quick=True),
        Shape("t5-large", (1, 16, 512, 64), tags=_LONG),
        Shape("t5-base-long", (1, 12, 2048, 64), tags=_LONG),
        Shape("swin-window", (128, 3, 49, 32), tags=("swin",)),
        Shape("swin-window-deep", (8, 24, 49, 32), tags=("swin",)),
        Shape("swin-v2", (32, 4, 256, 32), tags=_LONG),
        Shape("evoformer", (64, 8, 128, 32)),
        Shape("tiny", (1, 2, 8, 8), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager, compiled=False),),
    cost=products,
    reduction=terms,
    fused=True,
)
