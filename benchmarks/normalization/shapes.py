"""Sizes that several normalizations share, and the bytes that a normalization has to move."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch

from ..declaration import Cost, Shape

# [rows, width]: tokens by model width, from sizes that stay in a core's cache to ones that do not
# fit the machine's.
TOKENS = (
    Shape("bert-base-short", (128, 768)),
    Shape("gpt2", (4096, 768), quick=True),
    Shape("llama2-7b", (512, 4096), quick=True),
    Shape("vit-small", (8192, 256)),
    Shape("t5-large", (2048, 1024)),
    Shape("llama3-8b", (2048, 4096)),
    Shape("qwen3-qk", (65536, 128)),
    Shape("llama3-70b", (256, 8192)),
)

# The same number of elements in awkward widths and in round ones.
_ELEMENTS = 1 << 20
_ROUND_WIDTH = {1: 8, 7: 8, 63: 64, 1000: 1024, 1200: 1024, 5001: 4096}
ODD_WIDTHS = tuple(
    Shape("round", (_ELEMENTS // width, width), group="odd")
    for width in sorted(set(_ROUND_WIDTH.values()))
) + tuple(
    Shape("odd", (_ELEMENTS // width, width), group="odd", twin=f"round-{_ELEMENTS // twin}x{twin}")
    for width, twin in _ROUND_WIDTH.items()
)

TINY = Shape("tiny", (8, 16), group="overhead", quick=True)


def both_layouts(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    """Each shape, and again in channels-last where it has four or five dimensions."""
    found: list[Shape] = []
    for shape in shapes:
        found.append(shape)
        if len(shape.size) >= 4:
            found.append(dataclasses.replace(shape, layout="channels_last"))
    return tuple(found)


def passes(forward: int, backward: int) -> Callable[[Shape, torch.dtype], Cost]:
    """Cost of an op that moves its main tensor so many times; statistics and weights are small."""

    def cost(shape: Shape, dtype: torch.dtype) -> Cost:
        size = shape.numel * dtype.itemsize
        return Cost(forward * size, backward * size, 6 * shape.numel, 12 * shape.numel)

    return cost


def per_channel(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[C] or [B, C] shaped to broadcast over the dimensions of `like` after the channels."""
    leading = (1,) * (2 - tensor.dim())
    return tensor.reshape(*leading, *tensor.shape, *(1,) * (like.dim() - 2))
