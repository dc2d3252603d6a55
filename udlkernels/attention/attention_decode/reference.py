"""The formula of attention over a cache: write new keys, gather those of each sample, attend."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels.attention.attention.reference import attend, default_scale, limits


def attention_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *,
    cache_seqlens: torch.Tensor | int, block_table: torch.Tensor | None = None,
    k_new: torch.Tensor | None = None, v_new: torch.Tensor | None = None, rotary: Any = None,
    causal: str | None = "bottom_right", window: tuple[int | None, int | None] | None = None,
    alibi_slopes: torch.Tensor | None = None, softcap: float | None = None,
    sinks: torch.Tensor | None = None, scale: float | None = None, layout: str = "bthd",
    return_lse: bool = False,
) -> Any:  # fmt: skip
    if layout == "bthd":
        q, k_cache, v_cache = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        if k_new is not None and v_new is not None:
            k_new, v_new = k_new.transpose(1, 2), v_new.transpose(1, 2)
    lengths = torch.as_tensor(cache_seqlens, dtype=torch.int64, device=q.device).expand(q.shape[0])
    cos, sin, interleaved = (*(rotary or (None, None)), False)[:3]
    if k_new is not None and v_new is not None:
        append(k_cache, v_cache, k_new, v_new, lengths, block_table, cos, sin, interleaved)
        lengths = lengths + k_new.shape[2]
    _, left, right = limits(causal, window, 0, 0)
    out, lse = attend_cached(
        q, k_cache, v_cache, lengths, block_table, cos, sin, interleaved, alibi_slopes, sinks,
        left, right, default_scale(q) if scale is None else scale, softcap or 0.0,
    )  # fmt: skip
    out = out.transpose(1, 2) if layout == "bthd" else out
    return (out, lse) if return_lse else out


def append(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor,
    starts: torch.Tensor, block_table: Any, cos: Any, sin: Any, interleaved: bool,
) -> None:  # fmt: skip
    """Writes k_new, rotated, and v_new behind the starts [B]; heads before the rows in all."""
    batch, _, count, _ = k_new.shape
    at = starts[:, None] + torch.arange(count, device=starts.device)  # [B, Tn]
    if cos is not None:
        k_new = rotate(k_new, at, cos, sin, interleaved)
    if block_table is None:
        page = torch.arange(batch, device=at.device)[:, None].expand_as(at)
    else:
        page_size = k_cache.shape[2]
        page = block_table.to(torch.int64).gather(1, at // page_size)
        at = at % page_size
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        cache.transpose(1, 2)[page, at] = new.transpose(1, 2)


def attend_cached(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
    block_table: Any, cos: Any, sin: Any, interleaved: bool, alibi_slopes: Any, sinks: Any,
    left: int, right: int, scale: float, softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B, H, T, Dv] and lse [B, H, T] over the first lengths [B] keys of each sample."""
    first = lengths[:, None] - q.shape[2]  # the position of each sample's first query
    if cos is not None:
        q = rotate(q, first + torch.arange(q.shape[2], device=q.device), cos, sin, interleaved)
    k, v = k_cache, v_cache
    if block_table is not None:
        pages = block_table.to(torch.int64).clamp(0, max(k_cache.shape[0] - 1, 0))
        k, v = (t[pages].transpose(1, 2).flatten(2, 3) for t in (k, v))
    offset = first[:, None, None]  # [B, 1, 1, 1]
    return attend(
        q, k, v, None, None, lengths, alibi_slopes, sinks, None, offset, left, right, scale,
        softcap, 0.0,
    )  # fmt: skip


def rotate(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:  # fmt: skip
    """The first R elements of x [B, H, T, D] turned by the angles at positions [B, T]."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    at = positions.clamp(0, max(cos.shape[0] - 1, 0))
    c, s = (table.to(wide)[at][:, None] for table in (cos, sin))  # [B, 1, T, R/2]
    half = c.shape[-1]
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * c - b * s, a * s + b * c), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
