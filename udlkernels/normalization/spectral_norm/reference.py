"""The formula of spectral_norm in plain torch."""

from __future__ import annotations

import torch


def power_iteration(
    weight: torch.Tensor,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    iterations: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """u and v after so many iterations; it starts from u, or from v where there is no u."""
    matrix = weight.detach().flatten(1)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    u, v = (None if t is None else t.detach().to(matrix.dtype) for t in (u, v))
    start_from_u = u is not None
    for _ in range(iterations):
        if start_from_u:
            v = _unit(matrix.t().mv(u), eps)
        u = _unit(matrix.mv(v), eps)
        if not start_from_u:
            v = _unit(matrix.t().mv(u), eps)
    return u, _unit(matrix.t().mv(u), eps) if v is None else v


def scale(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weight / sigma, sigma = u^T W v with u and v constant."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return (wide / torch.dot(u, wide.flatten(1).mv(v))).to(weight.dtype)


def spectral_norm(
    weight: torch.Tensor, u: torch.Tensor, n_power_iterations: int = 1, eps: float = 1e-12
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new_u, v = power_iteration(weight, u, None, n_power_iterations, eps)
    return scale(weight, new_u, v), new_u.to(u.dtype), v.to(weight.dtype)


def _unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / x.square().sum().sqrt().clamp_min(eps)
