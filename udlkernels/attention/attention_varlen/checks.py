"""What `attention_varlen` asks of its arguments."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels._dispatch import describe
from udlkernels._errors import ArgumentError
from udlkernels.attention.attention import checks

OP = "attention_varlen"


def fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether q, k and v fit together."""
    return (
        q.dim() == k.dim() == v.dim() == 3
        and q.dtype == k.dtype == v.dtype
        and q.dtype.is_floating_point
        and q.device == k.device == v.device
        and k.shape[:2] == v.shape[:2]
        and q.shape[2] == k.shape[2]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
    )


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises with the words for what `fits` found."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ArgumentError(OP, name, "3 dimensions [N, H, D]", describe(tensor))
    if not q.dtype.is_floating_point:
        raise ArgumentError(OP, "q", "a floating point tensor", q.dtype)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ArgumentError(OP, name, f"{q.dtype} (q's type)", tensor.dtype)
    checks.check_devices(OP, q, {"k": k, "v": v})
    if k.shape[2] != q.shape[2]:
        raise ArgumentError(OP, "k", f"width {q.shape[2]} (q's), [Nk, Hkv, D]", list(k.shape))
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        wanted = f"heads that divide q's {heads}, [Nk, Hkv, D]"
        raise ArgumentError(OP, "k", wanted, list(k.shape))
    if v.shape[:2] != k.shape[:2]:
        wanted = f"{k.shape[0]} rows of {kv_heads} heads (k's), [Nk, Hkv, Dv]"
        raise ArgumentError(OP, "v", wanted, list(v.shape))


def check_sequences(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> None:
    """Raises where the ends of the sequences cannot be those of rows of q and of k."""
    for name, ends, rows in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0]),
    ):
        if ends.dim() != 1 or len(ends) == 0 or ends.dtype not in (torch.int32, torch.int64):
            wanted = "int32 or int64, one dimension [B + 1]"
            raise ArgumentError(OP, name, wanted, describe(ends))
        if ends.device != q.device:
            raise ArgumentError(OP, name, f"a tensor on {q.device} (q's device)", ends.device)
        if not checks.readable(ends):
            continue
        values = ends.tolist()
        if values[0] != 0 or values[-1] > rows or values != sorted(values):
            wanted = f"0, then ends that do not decrease, up to {rows} (the rows)"
            raise ArgumentError(OP, name, wanted, _shortened(values))
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        wanted = f"{len(cu_seqlens_q)} values (cu_seqlens_q's)"
        raise ArgumentError(OP, "cu_seqlens_k", wanted, len(cu_seqlens_k))


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 10 else f"[{', '.join(map(str, values[:10]))}, ...]"


def check_options(
    q: torch.Tensor, sequences: int, causal: Any, window: Any, softcap: Any, scale: Any,
    dropout_p: float, alibi_slopes: Any, sinks: Any, seed: Any,
) -> None:  # fmt: skip
    checks.check_numbers(OP, checks.ALIGNMENTS, causal, window, softcap, scale, dropout_p)
    checks.check_devices(OP, q, dict(alibi_slopes=alibi_slopes, sinks=sinks, seed=seed))
    checks.check_heads(OP, sequences, q.shape[1], alibi_slopes, sinks)
    if seed is not None:
        checks.check_seed(OP, seed)
