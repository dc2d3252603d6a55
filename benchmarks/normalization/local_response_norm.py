"""local_response_norm: the first layers of AlexNet and GoogLeNet, each with its own window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import passes

_ALEXNET = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
_GOOGLENET = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 1.0}


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {"x": Input(shape.size)}


def run(x: Tensor, size: int, alpha: float, beta: float, k: float, implementation: str) -> Any:
    return functional.local_response_norm(x, size, alpha, beta, k, implementation=implementation)


def eager(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Any:
    """Through float32, since PyTorch's own has no bfloat16 on the CPU."""
    return torch_functional.local_response_norm(x.float(), size, alpha, beta, k).to(x.dtype)


BENCHMARK = Benchmark(
    op="local_response_norm",
    family="normalization",
    shapes=(
        Shape("googlenet-stem", (8, 64, 56, 56), options=_GOOGLENET, quick=True),
        Shape("googlenet-conv2", (4, 192, 56, 56), options=_GOOGLENET),
        Shape("alexnet-conv1", (8, 96, 55, 55), options=_ALEXNET),
        Shape("alexnet-conv2", (8, 256, 27, 27), options=_ALEXNET),
        Shape("alexnet-single", (1, 96, 55, 55), options=_ALEXNET),
        Shape("cifar-convnet", (32, 64, 16, 16), options=_ALEXNET),
        Shape("tiny", (2, 4, 4, 4), group="overhead", options=_ALEXNET, quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=3),
)
