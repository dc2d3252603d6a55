"""The formula of merge_lse in plain torch.

A part without keys, whose logarithm is -inf, gives nothing, neither value nor gradient, be it NaN.
"""

from __future__ import annotations

import math

import torch


def merge_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor,
    *, layout: str = "bhtd",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dtype, wide = out_a.dtype, lse_a.dtype
    no_a, no_b = lse_a == -math.inf, lse_b == -math.inf
    a, b = lse_a.masked_fill(no_a, 0.0), lse_b.masked_fill(no_b, 0.0)
    lse = torch.where(no_a, b, torch.where(no_b, a, torch.logaddexp(a, b)))
    lse = lse.masked_fill(no_a & no_b, -math.inf)
    share_a = torch.sigmoid(a - b).masked_fill(no_b, 1.0).masked_fill(no_a, 0.0)
    share_b = torch.sigmoid(b - a).masked_fill(no_a, 1.0).masked_fill(no_b, 0.0)

    def beside(x: torch.Tensor) -> torch.Tensor:
        """[B, H, T] so that it broadcasts with the outputs."""
        return (x.transpose(1, 2) if layout == "bthd" else x).unsqueeze(-1)

    part_a = beside(share_a) * out_a.to(wide).masked_fill(beside(no_a), 0.0)
    part_b = beside(share_b) * out_b.to(wide).masked_fill(beside(no_b), 0.0)
    return (part_a + part_b).to(dtype), lse
