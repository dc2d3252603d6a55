"""The formula of attention over packed sequences: that of attention, one sequence at a time."""

from __future__ import annotations

import math
from typing import Any

import torch

from udlkernels.attention.attention.reference import attend, default_scale, limits


def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, *, causal: str | None = None,
    window: tuple[int | None, int | None] | None = None, alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None, sinks: torch.Tensor | None = None, scale: float | None = None,
    dropout_p: float = 0.0, seed: torch.Tensor | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    _, left, right = limits(causal, window, 0, 0)
    out, lse = attend_packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, int(causal == "bottom_right"),
        left, right, default_scale(q) if scale is None else scale, softcap or 0.0, dropout_p, seed,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attend_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, alibi_slopes: Any, sinks: Any, causal: int, left: int, right: int,
    scale: float, softcap: float, dropout_p: float, seed: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [Nq, H, Dv] and lse [H, Nq]; causal 1 moves each diagonal to its sequence's last key."""
    total, heads = q.shape[:2]
    generator_rows = torch.arange(heads * total, device=q.device).view(1, heads, total)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows = slice(starts_q[b], starts_q[b + 1])
        keys = slice(starts_k[b], starts_k[b + 1])
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        offset = causal * (keys.stop - keys.start - rows.stop + rows.start)
        one = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        out, lse = attend(
            one[0], one[1], one[2], None, None, None, slopes, sinks, seed, offset, left, right,
            scale, softcap, dropout_p, rows=generator_rows[..., rows],
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = total - starts_q[-1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs.append(q.new_zeros((rest, heads, v.shape[-1])))
    lses.append(q.new_full((heads, rest), -math.inf, dtype=wide))
    return torch.cat(outs), torch.cat(lses, 1)
