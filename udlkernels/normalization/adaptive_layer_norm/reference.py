"""The formula of adaptive_layer_norm in plain torch."""

from __future__ import annotations

import torch

from udlkernels.normalization.layer_norm import reference


def adaptive_layer_norm(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normal = reference.layer_norm(wide, x.shape[-1:], eps=eps)
    rows = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    gain = 1 + scale.to(normal.dtype)
    return (normal * gain.reshape(rows) + shift.to(normal.dtype).reshape(rows)).to(x.dtype)
