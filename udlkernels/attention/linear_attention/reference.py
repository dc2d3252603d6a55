"""The formula of linear attention in plain torch; with a causal mask by all weights of q and k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from udlkernels.attention.attention.reference import _products, _weigh

# The kernels' numbers for the maps they know.
FEATURE_MAPS = {"identity": 0, "elu_plus_one": 1, "relu": 2}


def mapped(x: torch.Tensor, feature_map: str | Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if feature_map == "elu_plus_one":
        return torch.where(x > 0, x + 1.0, x.clamp(max=0.0).exp())
    if feature_map == "relu":
        return torch.relu(x)
    return x if isinstance(feature_map, str) else feature_map(x)


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, feature_map: Any = "elu_plus_one",
    causal: bool = False, state: tuple[torch.Tensor, torch.Tensor] | None = None,
    return_state: bool = False,
) -> Any:  # fmt: skip
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        if callable(feature_map):
            q, k, feature_map = feature_map(q), feature_map(k), "identity"
        group = q.shape[1] // max(k.shape[1], 1)
        q, k, v = mapped(q.to(wide), feature_map), mapped(k.to(wide), feature_map), v.to(wide)
        kv, z = k.mT @ v, k.sum(2)
        after = (kv, z) if state is None else (kv + state[0], z + state[1])
        before = after if not causal else state
        total, divisor = v.new_zeros(()), v.new_zeros(())
        if before is not None:
            kv, z = (t.repeat_interleave(group, 1) for t in before)
            total, divisor = q @ kv, q @ z[..., None]
        if causal:
            keys, values = (t.repeat_interleave(group, 1) for t in (k, v))
            weights = _products(q, keys).tril()
            seen = torch.ones(weights.shape[2:], dtype=torch.bool, device=q.device).tril()
            total = total + _weigh(weights, seen, values)
            divisor = divisor + weights.sum(-1, keepdim=True)
        empty = divisor == 0.0
        out = (total / divisor.masked_fill(empty, 1.0)).masked_fill(empty, 0.0).to(dtype)
        return (out, after) if return_state else out
