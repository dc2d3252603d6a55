"""pixel_norm: the feature vectors of each pixel in progressively grown generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import both_layouts, passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {"x": Input(shape.size)}


def run(x: Tensor, implementation: str) -> Any:
    return functional.pixel_norm(x, implementation=implementation)


def eager(x: Tensor) -> Any:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


BENCHMARK = Benchmark(
    op="pixel_norm",
    family="normalization",
    shapes=both_layouts(
        (
            Shape("progan-16", (16, 512, 16, 16), quick=True),
            Shape("progan-32", (8, 512, 32, 32)),
            Shape("progan-64", (4, 256, 64, 64)),
            Shape("progan-128", (2, 128, 128, 128)),
            Shape("progan-256", (1, 64, 256, 256)),
            Shape("stylegan-latent", (4096, 512)),
            Shape("tiny", (8, 16), group="overhead", quick=True),
        )
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
    fused=True,
)
