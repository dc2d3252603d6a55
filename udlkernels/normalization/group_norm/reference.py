"""The formula of group_norm and group_norm_act in plain torch."""

from __future__ import annotations

import torch

from udlkernels.normalization._activation import activate


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """weight, bias: [C], or [B, C] where each sample has its own."""
    return _norm(x, num_groups, weight, bias, eps).to(x.dtype)


def group_norm_act(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    negative_slope: float = 0.01,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    y = _norm(x, num_groups, weight, bias, eps)
    if residual is not None:
        y = y + residual
    return activate(y, activation, negative_slope).to(x.dtype)


def _norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    groups = wide.unflatten(1, (num_groups, x.shape[1] // num_groups)).flatten(2)
    centred = groups - groups.mean(2, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(2, keepdim=True) + eps)
    y = y.reshape(x.shape)
    if weight is not None:
        y = y * _per_channel(weight, y)
    if bias is not None:
        y = y + _per_channel(bias, y)
    return y


def _per_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    trailing = (1,) * (like.dim() - 2)
    return values.to(like.dtype).reshape(*values.shape, *trailing)
