"""spectral_norm: weights of discriminators, one power iteration a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Cost, Input, Peer, Shape


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {"weight": Input(shape.size), "u": Input(shape.size[:1], grad=False)}


def run(weight: Tensor, u: Tensor, implementation: str) -> Any:
    return functional.spectral_norm(weight, u, implementation=implementation)


def eager(weight: Tensor, u: Tensor) -> Any:
    matrix = weight.flatten(1)
    with torch.no_grad():
        v = torch_functional.normalize(matrix.t() @ u, dim=0, eps=1e-12)
        u = torch_functional.normalize(matrix @ v, dim=0, eps=1e-12)
    sigma = torch.dot(u, matrix @ v)
    return weight / sigma, u, v


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Three products with the matrix and a scaling; the matrix need cross memory only once."""
    size = shape.numel * dtype.itemsize
    return Cost(2 * size, 3 * size, 7 * shape.numel, 6 * shape.numel)


BENCHMARK = Benchmark(
    op="spectral_norm",
    family="normalization",
    shapes=(
        Shape("sngan-3x3", (512, 512, 3, 3), quick=True),
        Shape("sngan-early", (128, 64, 4, 4)),
        Shape("sngan-middle", (256, 128, 4, 4)),
        Shape("sngan-late", (512, 256, 4, 4)),
        Shape("biggan-linear", (1024, 1024)),
        Shape("lipschitz-mlp", (512, 512)),
        Shape("tiny", (8, 16), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=cost,
)
