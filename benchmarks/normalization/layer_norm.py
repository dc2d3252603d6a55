"""layer_norm: rows of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import ODD_WIDTHS, TINY, TOKENS, passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    width = shape.size[-1:]
    return {"x": Input(shape.size), "weight": Input(width, "scale"), "bias": Input(width, "small")}


def run(x: Tensor, weight: Tensor, bias: Tensor, implementation: str) -> Any:
    return functional.layer_norm(x, weight.shape, weight, bias, implementation=implementation)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return torch_functional.layer_norm(x, weight.shape, weight, bias)


BENCHMARK = Benchmark(
    op="layer_norm",
    family="normalization",
    shapes=(*TOKENS, *ODD_WIDTHS, TINY),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
)
