"""adaptive_layer_norm: the modulated norms of diffusion transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    modulation = (shape.size[0], shape.size[-1])
    return {
        "x": Input(shape.size),
        "scale": Input(modulation, "small"),
        "shift": Input(modulation, "small"),
    }


def run(x: Tensor, scale: Tensor, shift: Tensor, implementation: str) -> Any:
    return functional.adaptive_layer_norm(x, scale, shift, implementation=implementation)


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
    normal = torch_functional.layer_norm(x, x.shape[-1:])
    return normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


BENCHMARK = Benchmark(
    op="adaptive_layer_norm",
    family="normalization",
    shapes=(
        Shape("dit-s", (16, 256, 384), quick=True),
        Shape("dit-b", (8, 256, 768)),
        Shape("dit-xl", (8, 256, 1152)),
        Shape("dit-xl-512", (2, 1024, 1152)),
        Shape("sd3", (2, 1024, 1536)),
        Shape("flux", (1, 1024, 3072)),
        Shape("tiny", (2, 4, 16), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
    fused=True,
)
