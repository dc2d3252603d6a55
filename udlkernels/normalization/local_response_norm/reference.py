"""The formula of local_response_norm in plain torch."""

from __future__ import annotations

import torch


def local_response_norm(
    x: torch.Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> torch.Tensor:
    wide = x if x.dtype in (torch.float64, torch.complex64, torch.complex128) else x.float()
    squares = wide.square().movedim(1, -1)
    padded = torch.nn.functional.pad(squares, (size // 2, (size - 1) // 2))
    windows = padded.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return (wide / (k + alpha / size * windows).pow(beta)).to(x.dtype)
