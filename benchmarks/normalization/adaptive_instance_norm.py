"""adaptive_instance_norm: style injection in generators of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import both_layouts, passes, per_channel


def inputs(shape: Shape) -> Mapping[str, Input]:
    style = shape.size[:2]
    return {"x": Input(shape.size), "scale": Input(style, "scale"), "shift": Input(style, "small")}


def run(x: Tensor, scale: Tensor, shift: Tensor, implementation: str) -> Any:
    return functional.adaptive_instance_norm(x, scale, shift, implementation=implementation)


def eager(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
    return torch_functional.instance_norm(x) * per_channel(scale, x) + per_channel(shift, x)


BENCHMARK = Benchmark(
    op="adaptive_instance_norm",
    family="normalization",
    shapes=both_layouts(
        (
            Shape("stylegan-16", (8, 512, 16, 16), quick=True),
            Shape("stylegan-32", (4, 512, 32, 32)),
            Shape("stylegan-128", (2, 128, 128, 128)),
            Shape("munit", (1, 256, 64, 64)),
            Shape("starganv2", (4, 256, 64, 64)),
            Shape("adain-encoder", (2, 512, 32, 32)),
            Shape("tiny", (2, 4, 4, 4), group="overhead", quick=True),
        )
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
    fused=True,
)
