"""The formula of apply_rotary in plain torch."""

from __future__ import annotations

import torch


def apply_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False,
    layout: str = "bhtd",
) -> torch.Tensor:  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads = -3 if layout == "bhtd" else -2
    cos, sin = (table.to(wide).unsqueeze(heads) for table in (cos, sin))
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        first, second = turned.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = first * cos - second * sin, second * cos + first * sin
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((y.to(x.dtype), rest), -1)
