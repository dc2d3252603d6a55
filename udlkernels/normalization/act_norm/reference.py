"""The formula of act_norm in plain torch."""

from __future__ import annotations

import torch

from udlkernels.normalization._channels import per_channel, positions_of


def act_norm(
    x: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    log_scale, bias = log_scale.to(wide.dtype), bias.to(wide.dtype)
    y = (wide + per_channel(bias, x)) * per_channel(log_scale.exp(), x)
    logdet = (positions_of(x) * log_scale.sum()).expand(x.shape[0])
    return y.to(x.dtype), logdet.clone()
