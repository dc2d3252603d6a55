"""scaled_dot_product_attention: self-attention of language and vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import products, terms

_CAUSAL = {"is_causal": True}


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {name: Input(shape.size) for name in ("q", "k", "v")}


def run(q: Tensor, k: Tensor, v: Tensor, implementation: str, is_causal: bool = False) -> Any:
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, implementation=implementation
    )


def eager(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Any:
    return torch_functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


BENCHMARK = Benchmark(
    op="scaled_dot_product_attention",
    family="attention",
    shapes=(
        Shape("gpt2", (1, 12, 2048, 64), options=_CAUSAL),
        Shape("gpt2-full", (1, 12, 2048, 64)),
        Shape("gpt2-short", (2, 12, 512, 64), options=_CAUSAL, quick=True),
        Shape("bert-base", (2, 12, 512, 64), quick=True),
        Shape("bert-base-short", (8, 12, 128, 64)),
        Shape("llama", (1, 8, 2048, 128), options=_CAUSAL),
        Shape("vit-base", (8, 12, 197, 64)),
        Shape("swin-window", (128, 3, 49, 32)),
        Shape("tiny", (1, 2, 8, 8), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager, compiled=False),),
    cost=products,
    reduction=terms,
)
