"""The formula of batch_norm and batch_norm_act in plain torch."""

from __future__ import annotations

import torch

from udlkernels.normalization._activation import activate


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] over everything but the channels of x [N, C, *]."""
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x if x.dtype == torch.float64 else x.float()
    mean = wide.mean(dims, keepdim=True)
    return mean.flatten(), (wide - mean).square().mean(dims)


def normalize(
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """act((x - mean) * rstd * weight + bias + residual), the vectors [C] along dimension 1."""
    wide = x if x.dtype == torch.float64 else x.float()
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = (wide - mean.to(wide.dtype).view(shape)) * rstd.to(wide.dtype).view(shape)
    if weight is not None:
        y = y * weight.to(y.dtype).view(shape)
    if bias is not None:
        y = y + bias.to(y.dtype).view(shape)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return activate(y, activation, negative_slope).to(x.dtype)


def batch_norm_act(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(batch_norm(x) + residual); updates the running statistics in training."""
    if training:
        mean, var = moments(x)
        count = x.numel() // x.shape[1]
        for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            if running is not None:
                running.copy_(((1 - momentum) * running + momentum * batch).detach())
    elif running_mean is not None and running_var is not None:
        mean, var = running_mean, running_var
    else:
        raise ValueError("evaluation needs running statistics")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = torch.rsqrt(var.to(wide) + eps)
    return normalize(x, mean, rstd, weight, bias, activation, negative_slope, residual)


def batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """batch_norm_act without an activation."""
    return batch_norm_act(
        x, running_mean, running_var, weight, bias, training, momentum, eps, "identity"
    )
