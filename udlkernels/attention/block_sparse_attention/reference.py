"""The formula of block-sparse attention in plain torch."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels.attention.attention.reference import attend, default_scale, limits


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: torch.Tensor, *,
    block_size: int, causal: str | None = None, scale: float | None = None,
    return_lse: bool = False,
) -> Any:  # fmt: skip
    found = attend(
        q, k, v, None, None, None, None, None, None, *limits(causal, None, q.shape[2], k.shape[2]),
        default_scale(q) if scale is None else scale, 0.0, 0.0,
        block_mask=block_mask, block_size=block_size,
    )  # fmt: skip
    return found if return_lse else found[0]
