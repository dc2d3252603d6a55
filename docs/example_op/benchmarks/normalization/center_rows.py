"""center_rows: rows of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import ODD_WIDTHS, TINY, TOKENS, passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {"x": Input(shape.size)}


def run(x: Tensor, implementation: str) -> Any:
    return functional.center_rows(x, implementation=implementation)


def eager(x: Tensor) -> Any:
    return x - x.mean(-1, keepdim=True)


BENCHMARK = Benchmark(
    op="center_rows",
    family="normalization",
    shapes=(*TOKENS, *ODD_WIDTHS, TINY),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=2),
)
