"""add_rms_norm: the residual sum and the norm after it, as in every block of a language model."""

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
    }


def run(x: Tensor, residual: Tensor, weight: Tensor, implementation: str) -> Any:
    return functional.add_rms_norm(
        x, residual, weight.shape, weight, eps=1e-6, implementation=implementation
    )


def eager(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    total = residual + x
    return torch_functional.rms_norm(total, weight.shape, weight, 1e-6), total


BENCHMARK = Benchmark(
    op="add_rms_norm",
    family="normalization",
    shapes=(*TOKENS, TINY),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=4, backward=4),
    fused=True,
)
