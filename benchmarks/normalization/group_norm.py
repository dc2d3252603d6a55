"""group_norm: feature maps of diffusion models and detectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import TINY, both_layouts, passes

SHAPES = both_layouts(
    dataclasses.replace(shape, options={"num_groups": 4 if shape is TINY else 32})
    for shape in (
        Shape("resnet50-conv2", (16, 64, 56, 56), quick=True),
        Shape("sd-unet-top", (2, 320, 64, 64)),
        Shape("sd-unet-middle", (2, 640, 32, 32)),
        Shape("sd-unet-deep", (2, 1280, 16, 16)),
        Shape("sd-vae", (1, 512, 64, 64)),
        Shape("resnet50-conv5", (16, 2048, 7, 7)),
        Shape("unet3d", (1, 64, 32, 32, 32)),
        TINY,
    )
)


def inputs(shape: Shape) -> Mapping[str, Input]:
    channels = shape.size[1:2]
    return {
        "x": Input(shape.size),
        "weight": Input(channels, "scale"),
        "bias": Input(channels, "small"),
    }


def run(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, implementation: str) -> Any:
    return functional.group_norm(x, num_groups, weight, bias, implementation=implementation)


def eager(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Any:
    return torch_functional.group_norm(x, num_groups, weight, bias)


BENCHMARK = Benchmark(
    op="group_norm",
    family="normalization",
    shapes=SHAPES,
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
)
