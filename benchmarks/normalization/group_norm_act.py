"""group_norm_act: group norm and SiLU, as before every convolution of a diffusion model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Peer
from . import group_norm
from .shapes import passes


def run(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, implementation: str) -> Any:
    return functional.group_norm_act(
        x, num_groups, weight, bias, activation="silu", implementation=implementation
    )


def eager(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Any:
    return torch_functional.silu(torch_functional.group_norm(x, num_groups, weight, bias))


BENCHMARK = Benchmark(
    op="group_norm_act",
    family="normalization",
    shapes=group_norm.SHAPES,
    inputs=group_norm.inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
    fused=True,
)
