"""The formula of attention in plain torch.

A key that a query does not see gives it nothing, neither a value nor a gradient, be it NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from udlkernels._philox import dropout
from udlkernels.attention.attention import sdpa

NO_LIMIT = 2**62


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: str | None = None,
    window: tuple[int | None, int | None] | None = None, mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, key_lengths: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None, softcap: float | None = None,
    sinks: torch.Tensor | None = None, score_mod: Any = None, mask_mod: Any = None,
    scale: float | None = None, dropout_p: float = 0.0, seed: torch.Tensor | None = None,
    layout: str = "bhtd", return_lse: bool = False,
) -> Any:  # fmt: skip
    if layout == "bthd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = attend(
        q, k, v, mask, bias, key_lengths, alibi_slopes, sinks, seed,
        *limits(causal, window, q.shape[2], k.shape[2]),
        default_scale(q) if scale is None else scale, softcap or 0.0, dropout_p,
        score_mod=score_mod, mask_mod=mask_mod,
    )  # fmt: skip
    out = out.transpose(1, 2) if layout == "bthd" else out
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, seed: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    folded = sdpa.fold(query, key, value, attn_mask, is_causal, enable_gqa)
    if folded is None:  # PyTorch's own error
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v, mask, bias, leading = folded
    causal = "top_left" if is_causal else None
    out = attention(
        q, k, v, causal=causal, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, seed=seed
    )
    return out if leading is None else out.reshape(*leading, *out.shape[2:])


def limits(causal: str | None, window: Any, queries: int, keys: int) -> tuple[int, int, int]:
    """(offset, left, right): query i sees key j where -left <= j - i - offset <= right."""
    if causal is None and window is None:
        return 0, NO_LIMIT, NO_LIMIT
    left, right = (NO_LIMIT if side is None else side for side in window or (None, None))
    return keys - queries if causal == "bottom_right" else 0, left, 0 if causal else right


def default_scale(q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, bias: Any, key_lengths: Any,
    alibi_slopes: Any, sinks: Any, seed: Any, offset: Any, left: int, right: int, scale: float,
    softcap: float, dropout_p: float, ranges: Any = None, block_mask: Any = None,
    block_size: int = 0, score_mod: Any = None, mask_mod: Any = None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B, H, T, Dv] and lse [B, H, T] of q, k, v with the heads before the rows.

    The offset may be a tensor that broadcasts to [B, 1, T, S]; rows: those of dropout's generator.
    """
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(wide)
        group = q.shape[1] // max(k.shape[1], 1)
        k, v = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
        s = scale * _products(q, k)
        if score_mod is not None:
            s = over_grid(score_mod, s.shape, s.device, s).to(wide)
        if softcap > 0.0:
            s = softcap * torch.tanh(s / softcap)
        i, j = (torch.arange(n, device=q.device) for n in s.shape[2:])
        distance = j - i[:, None] - offset  # [T, S]
        if alibi_slopes is not None:
            slopes = alibi_slopes.to(wide).reshape(-1, q.shape[1], 1, 1)
            s = s - slopes * distance.abs()
        seen = (distance >= -left) & (distance <= right)
        if key_lengths is not None:
            seen = seen & (j < key_lengths[:, None, None, None])
        if mask_mod is not None:
            seen = seen & over_grid(mask_mod, s.shape, s.device)
        if ranges is not None:
            low, high = ranges[:, None, :, :1], ranges[:, None, :, 1:]
            seen = seen & (j >= low) & (j < high)
        if block_mask is not None:
            seen = seen & spread_blocks(block_mask, block_size, *s.shape[2:])
        if mask is not None:
            seen = seen & mask
        if bias is not None:
            s, seen = s + bias.to(wide), seen & (bias != -math.inf)
        s = s.masked_fill(~seen, -math.inf)
        logits = s
        if sinks is not None:
            logits = torch.cat((s, sinks.to(wide)[:, None, None].expand(*s.shape[:3], 1)), -1)
        empty = (logits == -math.inf).all(-1, keepdim=True)
        logits = logits.masked_fill(empty, 0.0)
        lse = logits.logsumexp(-1, keepdim=True).masked_fill(empty, -math.inf).squeeze(-1)
        p = logits.softmax(-1).masked_fill(empty, 0.0)[..., : s.shape[-1]]
        p = dropout(p, dropout_p, seed, max(s.shape[-1], 1), rows)
        return _weigh(p, s != -math.inf, v).to(dtype), lse


def over_grid(function: Any, shape: Any, device: torch.device, *scores: torch.Tensor) -> Any:
    """A score_mod of scores, or a mask_mod, at every place of [B, H, T, S]."""
    if 0 in shape:
        return scores[0] if scores else torch.ones(shape, dtype=torch.bool, device=device)
    for dim in (3, 2, 1, 0):
        places = [0 if dim == other else None for other in range(4)]
        function = torch.vmap(function, (*(0 for _ in scores), *places))
    return function(*scores, *(torch.arange(n, device=device) for n in shape))


def spread_blocks(block_mask: torch.Tensor, size: int, queries: int, keys: int) -> torch.Tensor:
    """A mask of blocks [..., ceil(T / size), ceil(S / size)] as one of tokens [..., T, S]."""
    rows = torch.arange(queries, device=block_mask.device) // size
    cols = torch.arange(keys, device=block_mask.device) // size
    return block_mask[..., rows[:, None], cols]


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q . k, without a gradient through keys that are not finite: 0 * NaN would be one."""
    finite = k.isfinite().all(-1, keepdim=True)
    clean = q @ k.masked_fill(~finite, 0.0).mT
    return torch.where(finite.mT, clean, (q @ k.mT).detach())


def _weigh(p: torch.Tensor, seen: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """p . v, in which a value that is not finite counts for the rows alone that see it."""
    ends = [v.isnan() | (v == end) for end in (math.inf, -math.inf)]
    met = seen.to(v.dtype) @ torch.cat(ends, -1).to(v.dtype) > 0
    up, down = torch.zeros_like(met, dtype=v.dtype).masked_fill(met, math.inf).chunk(2, -1)
    return p @ v.masked_fill(~v.isfinite(), 0.0) + (up - down)
