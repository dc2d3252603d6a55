"""The formula of spectral_norm in plain torch."""

from __future__ import annotations

import torch


def power_iteration(
    weight: torch.Tensor, u: torch.Tensor, iterations: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """u after so many iterations, and its v."""
    matrix = weight.detach().flatten(1)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    u = u.detach().to(matrix.dtype)
    v = _unit(matrix.t().mv(u), eps)
    for i in range(iterations):
        v = _unit(matrix.t().mv(u), eps) if i > 0 else v
        u = _unit(matrix.mv(v), eps)
    return u, v


def scale(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weight / sigma, sigma = u^T W v with u and v constant."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return (wide / torch.dot(u, wide.flatten(1).mv(v))).to(weight.dtype)


def spectral_norm(
    weight: torch.Tensor, u: torch.Tensor, n_power_iterations: int = 1, eps: float = 1e-12
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new_u, v = power_iteration(weight, u, n_power_iterations, eps)
    return scale(weight, new_u, v), new_u.to(u.dtype), v.to(weight.dtype)


def _unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / x.square().sum().sqrt().clamp_min(eps)
