"""The formula of weight_norm in plain torch."""

from __future__ import annotations

import torch


def weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    wide = v if v.dtype in (torch.float64, torch.complex64, torch.complex128) else v.float()
    dims = [d for d in range(v.dim()) if dim == -1 or d != dim]
    squares = (wide.abs() if wide.is_complex() else wide).square()
    norm = squares.sum(dims, keepdim=True).sqrt() if dims else squares.sqrt()
    return (wide * (g.to(norm.dtype).reshape(norm.shape) / norm)).to(v.dtype)
