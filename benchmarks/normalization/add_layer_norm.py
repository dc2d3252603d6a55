"""add_layer_norm: the residual sum and the norm after it, as in every transformer block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import TINY, TOKENS, passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {
        "x": Input(shape.size),
        "residual": Input(shape.size),
        "weight": Input(shape.size[-1:], "scale"),
        "bias": Input(shape.size[-1:], "small"),
    }


def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, implementation: str) -> Any:
    return functional.add_layer_norm(
        x, residual, weight.shape, weight, bias, implementation=implementation
    )


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    total = residual + x
    return torch_functional.layer_norm(total, weight.shape, weight, bias), total


BENCHMARK = Benchmark(
    op="add_layer_norm",
    family="normalization",
    shapes=(*TOKENS, TINY),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=4, backward=4),
    fused=True,
)
