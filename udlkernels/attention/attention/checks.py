"""What `attention` asks of its arguments."""

from __future__ import annotations

import math
from typing import Any

import torch

from udlkernels._dispatch import describe
from udlkernels._errors import ArgumentError
from udlkernels.attention.attention.sdpa import broadcasts

OP = "attention"
ALIGNMENTS = (None, "top_left", "bottom_right")


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads_last: bool) -> bool:
    """Whether q, k and v, as the caller gave them, fit together."""
    a, b, c = q.shape, k.shape, v.shape
    if not (len(a) == len(b) == len(c) == 4):
        return False
    heads = 2 if heads_last else 1
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        return False
    if q.device != k.device or q.device != v.device:
        return False
    if a == b == c and a[heads] > 0:  # as in most calls
        return True
    return (
        a[0] == b[0] == c[0]
        and b[1] == c[1]
        and b[2] == c[2]
        and a[3] == b[3]
        and b[heads] > 0
        and a[heads] % b[heads] == 0
    )


def check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads_last: bool, op: str = OP
) -> None:
    """Raises with the words for what `fits` found."""
    order = "[B, T, H, D]" if heads_last else "[B, H, T, D]"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ArgumentError(op, name, f"4 dimensions {order}", describe(tensor))
    if not q.dtype.is_floating_point:
        raise ArgumentError(op, "q", "a floating point tensor", q.dtype)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ArgumentError(op, name, f"{q.dtype} (q's type)", tensor.dtype)
        if tensor.device != q.device:
            raise ArgumentError(op, name, f"a tensor on {q.device} (q's device)", tensor.device)
    heads_at, rows_at = (2, 1) if heads_last else (1, 2)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != q.shape[0]:
            wanted = f"a batch of {q.shape[0]} (q's), {order}"
            raise ArgumentError(op, name, wanted, list(tensor.shape))
    if k.shape[3] != q.shape[3]:
        raise ArgumentError(op, "k", f"width {q.shape[3]} (q's), {order}", list(k.shape))
    heads, kv_heads = q.shape[heads_at], k.shape[heads_at]
    if kv_heads == 0 or heads % kv_heads:
        wanted = f"heads that divide q's {heads}, {order}"
        raise ArgumentError(op, "k", wanted, list(k.shape))
    if v.shape[heads_at] != kv_heads or v.shape[rows_at] != k.shape[rows_at]:
        wanted = f"{kv_heads} heads of {k.shape[rows_at]} rows (k's), {order}"
        raise ArgumentError(op, "v", wanted, list(v.shape))


def check_options(
    q: torch.Tensor, k: torch.Tensor, causal: Any, window: Any, softcap: Any, scale: Any,
    dropout_p: float, mask: Any, bias: Any, key_lengths: Any, alibi_slopes: Any, sinks: Any,
    seed: Any,
) -> None:  # fmt: skip
    """Raises for an option that no implementation can take; q, k: [B, H, T, D]."""
    if causal not in ALIGNMENTS:
        raise ArgumentError(OP, "causal", f"one of {ALIGNMENTS}", repr(causal))
    if window is not None:
        _check_window(window)
    tensors = dict(
        mask=mask, bias=bias, key_lengths=key_lengths, alibi_slopes=alibi_slopes, sinks=sinks,
        seed=seed,
    )  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != q.device:
            raise ArgumentError(OP, name, f"a tensor on {q.device} (q's device)", tensor.device)
    if mask is not None or bias is not None:
        _check_masks(q, k, mask, bias)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, q.shape[0], k.shape[2])
    batch, heads = q.shape[:2]
    if alibi_slopes is not None and (
        not alibi_slopes.is_floating_point() or alibi_slopes.shape not in ((heads,), (batch, heads))
    ):
        wanted = f"floating point, shape [{heads}] or [{batch}, {heads}] (q's heads)"
        raise ArgumentError(OP, "alibi_slopes", wanted, describe(alibi_slopes))
    if sinks is not None and (not sinks.is_floating_point() or sinks.shape != (heads,)):
        wanted = f"floating point, shape [{heads}] (q's heads)"
        raise ArgumentError(OP, "sinks", wanted, describe(sinks))
    if softcap is not None and not 0.0 <= softcap < math.inf:
        raise ArgumentError(OP, "softcap", "None or a finite number >= 0", softcap)
    if scale is not None and not -math.inf < scale < math.inf:
        raise ArgumentError(OP, "scale", "None or a finite number", scale)
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(OP, "dropout_p", "a probability in [0, 1]", dropout_p)
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ArgumentError(OP, "seed", "an int64 tensor of one value", describe(seed))


def _check_window(window: Any) -> None:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ArgumentError(OP, "window", "a pair (left, right)", repr(window))
    for side in window:
        if side is not None and (not isinstance(side, int) or side < 0):
            raise ArgumentError(OP, "window", "integers >= 0 or None (no limit)", repr(window))


def _check_masks(q: torch.Tensor, k: torch.Tensor, mask: Any, bias: Any) -> None:
    shape = (*q.shape[:3], k.shape[2])
    if mask is not None and (mask.dtype != torch.bool or not broadcasts(mask, shape)):
        wanted = f"bool that broadcasts to [B, H, T, S] = {list(shape)}"
        hint = " (a float mask is a bias)" if mask.is_floating_point() else ""
        raise ArgumentError(OP, "mask", wanted + hint, describe(mask))
    if bias is not None and not (bias.is_floating_point() and broadcasts(bias, shape)):
        wanted = f"floating point that broadcasts to [B, H, T, S] = {list(shape)}"
        raise ArgumentError(OP, "bias", wanted, describe(bias))


def _check_key_lengths(key_lengths: torch.Tensor, batch: int, keys: int) -> None:
    if key_lengths.shape != (batch,) or key_lengths.dtype not in (torch.int32, torch.int64):
        wanted = f"int32 or int64, shape [{batch}] (q's batch)"
        raise ArgumentError(OP, "key_lengths", wanted, describe(key_lengths))
    # Reading values would wait for a GPU and cannot be traced; the kernels never pass S anyway.
    if (
        torch.compiler.is_compiling()
        or type(key_lengths) is not torch.Tensor
        or not key_lengths.is_cpu
        or torch._C._are_functorch_transforms_active()
        or batch == 0
    ):
        return
    least, most = (int(end) for end in key_lengths.aminmax())
    if least < 0 or most > keys:
        got = f"{least} to {most}"
        raise ArgumentError(OP, "key_lengths", f"lengths from 0 to {keys} (the keys)", got)
