"""PyTorch's flex_attention, for functions of scores and masks that the kernels do not know."""

from __future__ import annotations

import functools
from typing import Any

import torch

from udlkernels import _dispatch
from udlkernels.attention import modifiers
from udlkernels.attention.attention.reference import NO_LIMIT


def reasons(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, bias: Any, sinks: Any,
    dropout_p: float, with_lse: bool,
) -> list[str]:  # fmt: skip
    """Why flex_attention cannot serve a call."""
    given = dict(mask=mask, bias=bias, sinks=sinks, dropout_p=dropout_p or None)
    found = [f"flex_attention has no {name}" for name, value in given.items() if value is not None]
    if q.is_cpu and _dispatch.needs_grad(q, k, v):
        found.append("flex_attention has no backward on the CPU")
    if q.is_cpu and with_lse:
        found.append("flex_attention has no lse on the CPU")
    if q.dtype == torch.float64:
        found.append("flex_attention has no float64")
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        found.append("tensors without elements")
    if _dispatch._functorch_active() or _dispatch.forward_ad._current_level >= 0:
        found.append("inside a functorch transform or forward-mode differentiation")
    return found


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score_mod: Any, mask_mod: Any,
    key_lengths: Any, alibi_slopes: Any, offset: int, left: int, right: int, scale: float,
    softcap: float, with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """out, and lse with_lse; the options come behind score_mod, and beside mask_mod."""
    scores = [] if score_mod is None else [score_mod]
    masks = [] if mask_mod is None else [mask_mod]
    if softcap > 0.0:
        scores.append(modifiers.softcap(softcap))
    if alibi_slopes is not None:
        scores.append(modifiers.alibi(alibi_slopes, offset))
    if left != NO_LIMIT or right != NO_LIMIT:
        before, after = (None if side == NO_LIMIT else side for side in (left, right))
        masks.append(modifiers.window(before, after, offset))
    if key_lengths is not None:
        masks.append(modifiers.key_padding(key_lengths))
    attention, block_mask = _flex()
    blocks = None
    if masks:
        sizes = *q.shape[:3], k.shape[2]
        blocks = block_mask(modifiers.Every(tuple(masks)), *sizes, device=q.device)
    from torch.nn.attention.flex_attention import AuxRequest

    found = attention(
        q, k, v, modifiers.Chain(tuple(scores)) if scores else None, blocks, scale,
        q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True) if with_lse else None,
    )  # fmt: skip
    out, lse = (found[0], found[1].lse) if with_lse else (found, None)
    return out.contiguous(), lse


def _flex() -> Any:
    """flex_attention and create_block_mask; outside of compiled code, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if torch.compiler.is_compiling():
        return flex_attention, create_block_mask
    return _compiled()


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)
