"""The formula of instance_norm and adaptive_instance_norm in plain torch."""

from __future__ import annotations

import torch

from udlkernels.normalization.group_norm.reference import group_norm


def instance_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    if use_input_stats:
        if running_mean is not None and running_var is not None:
            var, mean = torch.var_mean(x.detach().flatten(2).to(running_mean.dtype), 2)
            update_running(running_mean, mean, momentum)
            update_running(running_var, var, momentum)
        return group_norm(x, x.shape[1], weight, bias, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    shape = (-1, *(1,) * (x.dim() - 2))
    assert running_mean is not None and running_var is not None
    y = (wide - running_mean.reshape(shape)) * torch.rsqrt(running_var.reshape(shape) + eps)
    if weight is not None:
        y = y * weight.reshape(shape)
    if bias is not None:
        y = y + bias.reshape(shape)
    return y.to(x.dtype)


def update_running(running: torch.Tensor, samples: torch.Tensor, momentum: float) -> None:
    """Moves a running statistic [C] towards the mean of all samples' [B, C]."""
    with torch.no_grad():
        running.copy_(running * (1 - momentum) + samples.mean(0) * momentum)


def adaptive_instance_norm(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    return group_norm(x, x.shape[1], scale, shift, eps)
