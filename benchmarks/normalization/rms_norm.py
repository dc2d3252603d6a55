"""rms_norm: rows of language models and of the vectors inside attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import ODD_WIDTHS, TINY, TOKENS, passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {"x": Input(shape.size), "weight": Input(shape.size[-1:], "scale")}


def run(x: Tensor, weight: Tensor, implementation: str) -> Any:
    return functional.rms_norm(x, weight.shape, weight, 1e-6, implementation=implementation)


def eager(x: Tensor, weight: Tensor) -> Any:
    return torch_functional.rms_norm(x, weight.shape, weight, 1e-6)


BENCHMARK = Benchmark(
    op="rms_norm",
    family="normalization",
    shapes=(*TOKENS, *ODD_WIDTHS, TINY),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
)
