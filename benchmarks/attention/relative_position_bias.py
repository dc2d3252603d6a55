"""relative_position_bias: the learned tables of Swin's windows and of T5's buckets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udlkernels import functional
from udlkernels.attention import swin_index, t5_index

from ..declaration import Benchmark, Cost, Input, Peer, Shape

# Queries and keys of the shapes with T5's buckets.
_LENGTHS = {"t5-base": 512, "t5-large": 512, "t5-base-long": 1024}


def index(shape: Shape) -> Tensor:
    """That of a square window where the table has as many rows as one needs, else T5's."""
    rows = shape.size[0]
    side = math.isqrt(rows)
    if side * side == rows and side % 2:
        return swin_index((side + 1) // 2, (side + 1) // 2)
    length = _LENGTHS.get(shape.name, 128)
    return t5_index(length, length, num_buckets=rows)


def inputs(shape: Shape) -> Mapping[str, Input]:
    size = tuple(index(shape).shape)
    return {
        "table": Input(shape.size),
        "index": Input(size, grad=False, value=lambda: index(shape)),
    }


def run(table: Tensor, index: Tensor, implementation: str) -> Any:
    return functional.relative_position_bias(table, index, implementation=implementation)


def eager(table: Tensor, index: Tensor) -> Any:
    return table[index].permute(2, 0, 1).contiguous()


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """The bias and the table once; an index of 8 bytes a position is shared by all heads."""
    bias = index(shape).numel() * shape.size[1]
    moved = (bias + shape.numel) * dtype.itemsize
    return Cost(moved, moved, 0, bias)


BENCHMARK = Benchmark(
    op="relative_position_bias",
    family="attention",
    shapes=(
        Shape("swin-t-1", (169, 3)),
        Shape("swin-t-3", (169, 12)),
        Shape("swin-t-4", (169, 24), quick=True),
        Shape("swin-b-384", (529, 16)),
        Shape("swin-v2-b", (961, 32)),
        Shape("coatnet-0", (729, 12)),
        Shape("t5-base", (32, 12), quick=True),
        Shape("t5-large", (32, 16)),
        Shape("t5-base-long", (32, 12)),
        Shape("tiny", (9, 2), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=cost,
    fused=True,
    reduction=lambda shape: index(shape).numel() // shape.size[0],
)
