"""The formula of rms_norm and add_rms_norm in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from udlkernels._philox import dropout


def rms_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    cast: str = "end",
) -> torch.Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = x if x.dtype in (torch.float64, torch.complex64, torch.complex128) else x.float()
    if eps is None:
        eps = torch.finfo(wide.dtype).eps
    mean_square = (wide.abs() if wide.is_complex() else wide).square().mean(dims, keepdim=True)
    y = wide * torch.rsqrt(mean_square + eps)
    if weight is not None and cast == "before_weight":
        y = y.to(x.dtype).to(y.dtype)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    return y.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    cast: str = "end",
) -> tuple[torch.Tensor, torch.Tensor]:
    s = residual + dropout(x, dropout_p, seed, math.prod(normalized_shape))
    return rms_norm(s, normalized_shape, weight, eps, weight_offset, cast), s
