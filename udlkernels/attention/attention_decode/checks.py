"""What `attention_decode` asks of its arguments, before anything is written to a cache."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels._dispatch import describe
from udlkernels._errors import ArgumentError
from udlkernels.attention.attention import checks

OP = "attention_decode"
ALIGNMENTS = (None, "bottom_right")
_INTEGERS = (torch.int32, torch.int64)


def check_tensors(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k_new: Any, v_new: Any,
    paged: bool, heads_last: bool,
) -> None:  # fmt: skip
    """Raises where queries, caches and new keys, as the caller gave them, do not fit together."""
    names = dict(q=q, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new)
    if (k_new is None) != (v_new is None):
        given, missing = ("v_new", "k_new") if k_new is None else ("k_new", "v_new")
        raise ArgumentError(OP, missing, f"a tensor beside {given}", "None")
    order = "[B, T, H, D]" if heads_last else "[B, H, T, D]"
    for name, tensor in names.items():
        if tensor is not None and tensor.dim() != 4:
            raise ArgumentError(OP, name, f"4 dimensions {order}", describe(tensor))
    if not q.dtype.is_floating_point:
        raise ArgumentError(OP, "q", "a floating point tensor", q.dtype)
    for name, tensor in names.items():
        if tensor is not None and tensor.dtype != q.dtype:
            raise ArgumentError(OP, name, f"{q.dtype} (q's type)", tensor.dtype)
    checks.check_devices(OP, q, names)
    heads_at, rows_at = (2, 1) if heads_last else (1, 2)
    if not paged and k_cache.shape[0] != q.shape[0]:
        wanted = f"a batch of {q.shape[0]} (q's), {order}"
        raise ArgumentError(OP, "k_cache", wanted, list(k_cache.shape))
    if k_cache.shape[3] != q.shape[3]:
        wanted = f"width {q.shape[3]} (q's), {order}"
        raise ArgumentError(OP, "k_cache", wanted, list(k_cache.shape))
    heads, kv_heads = q.shape[heads_at], k_cache.shape[heads_at]
    if kv_heads == 0 or heads % kv_heads:
        wanted = f"heads that divide q's {heads}, {order}"
        raise ArgumentError(OP, "k_cache", wanted, list(k_cache.shape))
    if v_cache.shape[:3] != k_cache.shape[:3]:
        wanted = f"{list(k_cache.shape[:3])} and a width (k_cache's), {order}"
        raise ArgumentError(OP, "v_cache", wanted, list(v_cache.shape))
    if k_new is not None:
        for name, new, cache in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
            shape = [q.shape[0], k_new.shape[rows_at], kv_heads, cache.shape[3]]
            if not heads_last:
                shape[1], shape[2] = shape[2], shape[1]
            if list(new.shape) != shape:
                raise ArgumentError(OP, name, f"shape {shape}", list(new.shape))
        _check_written(k_cache=k_cache, v_cache=v_cache)


def _check_written(**caches: torch.Tensor) -> None:
    for name, cache in caches.items():
        strides = zip(cache.stride(), cache.shape, strict=True)
        if any(stride == 0 and size > 1 for stride, size in strides):
            wanted = "elements of their own, to write new keys to"
            raise ArgumentError(OP, name, wanted, f"strides {tuple(cache.stride())}")


def check_places(
    q: torch.Tensor, cache_seqlens: Any, block_table: Any, rotary: Any
) -> None:  # fmt: skip
    """Raises for shapes, types or devices of lengths, block table and angles; q: [B, H, T, D]."""
    batch, width = q.shape[0], q.shape[3]
    if not isinstance(cache_seqlens, int):
        wanted = f"an integer, or int32 or int64 of shape [{batch}] (q's batch)"
        if not isinstance(cache_seqlens, torch.Tensor):
            raise ArgumentError(OP, "cache_seqlens", wanted, repr(cache_seqlens))
        if cache_seqlens.shape != (batch,) or cache_seqlens.dtype not in _INTEGERS:
            raise ArgumentError(OP, "cache_seqlens", wanted, describe(cache_seqlens))
        checks.check_devices(OP, q, {"cache_seqlens": cache_seqlens})
    if block_table is not None:
        if (
            block_table.dim() != 2
            or block_table.shape[0] != batch
            or block_table.dtype not in _INTEGERS
        ):
            wanted = f"int32 or int64, shape [{batch}, P] (q's batch)"
            raise ArgumentError(OP, "block_table", wanted, describe(block_table))
        checks.check_devices(OP, q, {"block_table": block_table})
    if rotary is None:
        return
    if not isinstance(rotary, (tuple, list)) or len(rotary) not in (2, 3):
        raise ArgumentError(OP, "rotary", "(cos, sin) or (cos, sin, interleaved)", repr(rotary))
    cos, sin = rotary[:2]
    if (
        cos.dim() != 2
        or cos.shape != sin.shape
        or not (cos.is_floating_point() and sin.is_floating_point())
        or 2 * cos.shape[1] > width
    ):
        wanted = f"floating point tables [positions, R / 2], R up to {width} (q's width)"
        raise ArgumentError(OP, "rotary", wanted, describe(cos, sin))
    checks.check_devices(OP, q, {"rotary": cos})
    checks.check_devices(OP, q, {"rotary": sin})


def check_values(
    cache_seqlens: Any, new: int, page_size: int, pages: int, block_table: Any, capacity: int,
    positions: int | None,
) -> None:  # fmt: skip
    """Raises for lengths or pages outside of the cache; looks at what it can without waiting.

    Args:
        new: how many keys are written behind cache_seqlens.
        positions: how many the tables of angles have, None without.
    """
    if isinstance(cache_seqlens, int):
        least = most = cache_seqlens
    elif cache_seqlens.numel() and checks.readable(cache_seqlens):
        least, most = (int(end) for end in cache_seqlens.aminmax())
    else:
        return
    if least < 0 or most + new > capacity:
        got = f"{least} to {most}" + (f", and {new} new keys" if new else "")
        wanted = f"lengths from 0 to {capacity} (the cache's capacity)"
        raise ArgumentError(OP, "cache_seqlens", wanted, got)
    if positions is not None and most + new > positions:
        wanted = f"angles of {most + new} positions (the longest sample's)"
        raise ArgumentError(OP, "rotary", wanted, positions)
    if block_table is None or not block_table.numel() or not checks.readable(block_table):
        return
    used = torch.arange(block_table.shape[1]) * page_size < torch.as_tensor(
        cache_seqlens + new
    ).reshape(-1, 1)
    bad = used & ((block_table < 0) | (block_table >= pages))
    if bool(bad.any()):
        got = str(int(block_table[bad][0]))
        wanted = f"pages from 0 to {pages - 1} where a sample has keys"
        raise ArgumentError(OP, "block_table", wanted, got)


def check_options(
    q: torch.Tensor, causal: Any, window: Any, softcap: Any, scale: Any, alibi_slopes: Any,
    sinks: Any,
) -> None:  # fmt: skip
    """q: [B, H, T, D]."""
    checks.check_numbers(OP, ALIGNMENTS, causal, window, softcap, scale, 0.0)
    checks.check_devices(OP, q, dict(alibi_slopes=alibi_slopes, sinks=sinks))
    checks.check_heads(OP, q.shape[0], q.shape[1], alibi_slopes, sinks)
