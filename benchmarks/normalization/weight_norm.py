"""weight_norm: weights of convolutions and linear layers, one norm for each output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    norms = (shape.size[0], *(1,) * (len(shape.size) - 1))
    return {"v": Input(shape.size), "g": Input(norms, "scale")}


def run(v: Tensor, g: Tensor, implementation: str) -> Any:
    return functional.weight_norm(v, g, implementation=implementation)


def eager(v: Tensor, g: Tensor) -> Any:
    return torch._weight_norm(v, g, 0)


BENCHMARK = Benchmark(
    op="weight_norm",
    family="normalization",
    shapes=(
        Shape("wav2vec2-projection", (512, 512, 3)),
        Shape("hifigan", (512, 256, 16), quick=True),
        Shape("wavenet", (512, 256, 2)),
        Shape("tcn", (128, 128, 7)),
        Shape("linear", (1024, 1024)),
        Shape("linear-wide", (4096, 1024)),
        Shape("conv3x3", (512, 512, 3, 3)),
        Shape("tiny", (8, 16), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
)
