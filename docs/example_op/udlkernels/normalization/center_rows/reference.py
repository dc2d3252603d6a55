"""The formula of center_rows in plain torch."""

from __future__ import annotations

import torch


def center_rows(x: torch.Tensor) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide - wide.mean(-1, keepdim=True)).to(x.dtype)
