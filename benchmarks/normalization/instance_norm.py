"""instance_norm: style transfer, image translation, segmentation of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import both_layouts, passes

SHAPES = both_layouts(
    (
        Shape("resnet50-conv2", (16, 64, 56, 56), quick=True),
        Shape("style-transfer", (2, 32, 256, 256)),
        Shape("style-transfer-deep", (4, 128, 64, 64)),
        Shape("cyclegan", (1, 256, 64, 64)),
        Shape("nnunet3d", (1, 32, 48, 48, 48)),
        Shape("adain-decoder", (8, 512, 16, 16)),
        Shape("wavenet", (8, 256, 1024)),
        Shape("tiny", (2, 4, 16), group="overhead", quick=True),
    )
)


def inputs(shape: Shape) -> Mapping[str, Input]:
    channels = shape.size[1:2]
    return {
        "x": Input(shape.size),
        "weight": Input(channels, "scale"),
        "bias": Input(channels, "small"),
    }


def run(x: Tensor, weight: Tensor, bias: Tensor, implementation: str) -> Any:
    return functional.instance_norm(x, weight=weight, bias=bias, implementation=implementation)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return torch_functional.instance_norm(x, weight=weight, bias=bias)


BENCHMARK = Benchmark(
    op="instance_norm",
    family="normalization",
    shapes=SHAPES,
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
)
