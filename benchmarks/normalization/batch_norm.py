"""batch_norm in training: feature maps of residual networks, and the book's MNIST-1D network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import TINY, both_layouts, passes

SHAPES = both_layouts(
    (
        Shape("resnet50-conv2", (16, 64, 56, 56), quick=True),
        Shape("resnet50-stem", (8, 64, 112, 112)),
        Shape("resnet50-conv3", (16, 512, 28, 28)),
        Shape("resnet50-conv4", (16, 256, 14, 14)),
        Shape("resnet50-conv5", (16, 2048, 7, 7)),
        Shape("cifar-resnet", (128, 16, 32, 32)),
        Shape("mnist1d-resnet", (100, 100, 40)),
        Shape("mlp", (256, 1024)),
        TINY,
    )
)


def inputs(shape: Shape) -> Mapping[str, Input]:
    """Weights and statistics are float32, as in mixed-precision training, and not at their start:
    a running mean of zero would hold only the rounding of the batch's.
    """
    channels = shape.size[1:2]
    full = torch.float32
    return {
        "x": Input(shape.size),
        "running_mean": Input(channels, "small", grad=False, dtype=full, written=True),
        "running_var": Input(channels, "scale", grad=False, dtype=full, written=True),
        "weight": Input(channels, "scale", dtype=full),
        "bias": Input(channels, "small", dtype=full),
    }


def run(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    implementation: str,
) -> Any:
    return functional.batch_norm(
        x, running_mean, running_var, weight, bias, True, implementation=implementation
    )


def eager(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor
) -> Any:
    return torch_functional.batch_norm(x, running_mean, running_var, weight, bias, True)


BENCHMARK = Benchmark(
    op="batch_norm",
    family="normalization",
    shapes=SHAPES,
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
)
