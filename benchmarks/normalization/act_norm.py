"""act_norm: the affine layers of invertible flows, with their log-determinant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import both_layouts, passes, per_channel


def inputs(shape: Shape) -> Mapping[str, Input]:
    channels = shape.size[1:2]
    return {
        "x": Input(shape.size),
        "log_scale": Input(channels, "small"),
        "bias": Input(channels, "small"),
    }


def run(x: Tensor, log_scale: Tensor, bias: Tensor, implementation: str) -> Any:
    return functional.act_norm(x, log_scale, bias, implementation=implementation)


def eager(x: Tensor, log_scale: Tensor, bias: Tensor) -> Any:
    y = (x + per_channel(bias, x)) * per_channel(log_scale.exp(), x)
    positions = x[0, 0].numel()
    return y, (log_scale.sum() * positions).expand(x.shape[0])


BENCHMARK = Benchmark(
    op="act_norm",
    family="normalization",
    shapes=both_layouts(
        (
            Shape("glow-cifar-1", (64, 12, 16, 16), quick=True),
            Shape("glow-cifar-2", (64, 24, 8, 8)),
            Shape("glow-cifar-3", (64, 48, 4, 4)),
            Shape("glow-celeba-1", (8, 12, 128, 128)),
            Shape("glow-celeba-3", (8, 48, 32, 32)),
            Shape("tabular-flow", (4096, 64)),
            Shape("tiny", (8, 16), group="overhead", quick=True),
        )
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
    fused=True,
)
