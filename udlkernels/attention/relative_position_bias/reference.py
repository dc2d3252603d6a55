"""The formula of relative_position_bias in plain torch."""

from __future__ import annotations

import torch


def relative_position_bias(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    rows = table.to(wide)[index.long()]  # [T, S, H]; the gradient is summed in the wider type
    return rows.permute(2, 0, 1).to(table.dtype).contiguous()
