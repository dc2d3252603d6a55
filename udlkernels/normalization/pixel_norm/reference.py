"""The formula of pixel_norm in plain torch."""

from __future__ import annotations

import torch


def pixel_norm(x: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)).to(x.dtype)
