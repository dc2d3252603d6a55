"""batch_norm_act: batch norm, the residual sum and ReLU at the end of a residual block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from . import batch_norm
from .shapes import passes


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {**batch_norm.inputs(shape), "residual": Input(shape.size)}


def run(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    implementation: str,
) -> Any:
    return functional.batch_norm_act(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        True,
        activation="relu",
        residual=residual,
        implementation=implementation,
    )


def eager(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
) -> Any:
    normal = torch_functional.batch_norm(x, running_mean, running_var, weight, bias, True)
    return torch_functional.relu(normal + residual)


BENCHMARK = Benchmark(
    op="batch_norm_act",
    family="normalization",
    shapes=batch_norm.SHAPES,
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=3, backward=4),
    fused=True,
)
