"""merge_lse: parts of a long context, of a split cache, of a ring of devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from ..normalization.shapes import passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    out, lse = Input(shape.size), Input(shape.size[:-1], dtype=torch.float32)
    return {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}


def run(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, implementation: str) -> Any:
    return functional.merge_lse(out_a, lse_a, out_b, lse_b, implementation=implementation)


def eager(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Any:
    lse = torch.logaddexp(lse_a, lse_b)
    out = (lse_a - lse).exp()[..., None] * out_a + (lse_b - lse).exp()[..., None] * out_b
    return out.to(out_a.dtype), lse


BENCHMARK = Benchmark(
    op="merge_lse",
    family="attention",
    shapes=(
        Shape("gpt2", (1, 12, 2048, 64), quick=True),
        Shape("llama3-8b", (1, 32, 2048, 128), quick=True),
        Shape("llama3-8b-tokens", (32, 32, 1, 128)),
        Shape("gemma2-9b", (1, 16, 2048, 256)),
        Shape("bert-base", (4, 12, 512, 64)),
        Shape("vit-base", (8, 12, 197, 64)),
        Shape("deepseek-v3-latent", (4, 128, 16, 512)),
        Shape("tiny", (1, 2, 8, 8), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=3, backward=5),
    reduction=lambda shape: shape.size[-1],
    fused=True,
)
