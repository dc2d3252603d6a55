"""How scaled_dot_product_attention's arguments become those of the attention ops.

Leading dimensions of any number, broadcast as PyTorch does, turn into batch and heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from udlkernels import _dispatch
from udlkernels._dispatch import describe

Folded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any, Any, Any]
MAX_WIDTH = 512


def fold(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> Folded | None:
    """The ops' (q, k, v, mask, bias), and the result's leading shape where it is not [B, H].

    None where the arguments do not fit together; PyTorch's op has the words for it.
    """
    q, k, v = query.shape, key.shape, value.shape
    if not (
        query.dtype == key.dtype == value.dtype
        and min(len(q), len(k), len(v)) >= 2 + enable_gqa
        and q[-1] == k[-1]
        and k[-2] == v[-2]
        and not (is_causal and attn_mask is not None)
    ):
        return None
    if (
        len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and k[1] == v[1]
        and (q[1] == k[1] or (enable_gqa and k[1] > 0 and q[1] % k[1] == 0))
    ):
        leading = None
    else:
        spread = _spread(q, k, v, enable_gqa)
        if spread is None:
            return None
        batch, heads, kv_heads, leading = spread
        query = _to_four(query, batch, heads)
        key, value = _to_four(key, batch, kv_heads), _to_four(value, batch, kv_heads)
    if attn_mask is None:
        return query, key, value, None, None, leading
    batch_dims = tuple(query.shape[:1]) if leading is None else leading[:-1]
    mask = _fold_mask(attn_mask, query, key, batch_dims, 4 if leading is None else len(leading) + 2)
    if mask is None:
        return None
    boolean = mask.dtype == torch.bool
    return query, key, value, mask if boolean else None, None if boolean else mask, leading


def alike(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether all three are one [B, H, L, E] that the kernels take: as in most calls."""
    shape = q.shape
    return (
        len(shape) == 4
        and shape[3] <= MAX_WIDTH
        and shape == k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and (q.is_cpu or not _no_tables(k, v))
    )


def _spread(
    q: torch.Size, k: torch.Size, v: torch.Size, grouped: bool
) -> tuple[tuple[int, ...], int, int, tuple[int, ...]] | None:
    """The batch dimensions, the heads of q, those of k and v, and the result's leading shape."""
    try:
        if grouped:
            heads, kv_heads = q[-3], k[-3]
            if v[-3] != kv_heads or kv_heads == 0 or heads % kv_heads:
                return None
            batch = tuple(torch.broadcast_shapes(q[:-3], k[:-3], v[:-3]))
            return batch, heads, kv_heads, (*batch, heads)
        leading = tuple(torch.broadcast_shapes(q[:-2], k[:-2], v[:-2]))
    except RuntimeError:
        return None
    if not leading:
        return (), 1, 1, ()
    shared = all(len(shape) < 3 or shape[-3] == 1 for shape in (k, v))
    return leading[:-1], leading[-1], 1 if shared else leading[-1], leading


def _to_four(x: torch.Tensor, batch: tuple[int, ...], heads: int) -> torch.Tensor:
    """[prod(batch), heads, rows, width], a view where the strides allow one."""
    rows, width = x.shape[-2:]
    return x.expand(*batch, heads, rows, width).reshape(math.prod(batch), heads, rows, width)


def _fold_mask(
    mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor, batch: tuple[int, ...], rank: int
) -> torch.Tensor | None:
    """The mask with at most four dimensions, which broadcasts to [B, H, L, S]; None if none can."""
    full = (*batch, q.shape[1], q.shape[2], k.shape[2])[-max(rank, 2) :]
    if mask.dtype not in (torch.bool, torch.float32, q.dtype) or not broadcasts(mask, full):
        return None
    if mask.dim() <= 3 or len(batch) == 1:
        return mask
    last = mask.shape[-3:]
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(1, *last)
    return mask.expand(*batch, *last).reshape(math.prod(batch), *last)


def broadcasts(x: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> bool:
    """Whether x can be expanded to the shape."""
    if x.dim() > len(shape):
        return False
    for ours, theirs in zip(reversed(x.shape), reversed(shape), strict=False):
        if ours != 1 and ours != theirs:
            return False
    return True


def kernel_takes(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernels can work on keys and values [..., S, D] that fit together."""
    return (
        k.shape[-1] <= MAX_WIDTH
        and v.shape[-1] <= MAX_WIDTH
        and k.numel() != 0
        and v.numel() != 0
        and (k.is_cpu or not _no_tables(k, v))
    )


def _no_tables(k: torch.Tensor, v: torch.Tensor) -> str:
    """Why there is no launch on this GPU, or nothing."""
    if torch.version.hip is not None:
        return "no launch tables for AMD GPUs"
    if k.dtype == torch.float64 and max(k.shape[-1], v.shape[-1]) > 256:
        return "no launch tables for float64 heads of more than 256 elements"
    return ""


def kernel_takes_not(k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """`kernel_takes` in words."""
    found = [
        f"heads of {x.shape[-1]} elements, more than the kernels' {MAX_WIDTH}"
        for x in (k, v)
        if x.dim() and x.shape[-1] > MAX_WIDTH
    ]
    if k.numel() == 0 or v.numel() == 0:
        found.append("the keys or values have no elements")
    if k.is_cuda and _no_tables(k, v):
        found.append(_no_tables(k, v))
    return found


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, p: float) -> bool:
    """`kernel_takes` for PyTorch's arguments; whether they fit together is `fold`'s question."""
    return (
        key.dim() >= 2
        and value.dim() >= 2
        and kernel_takes(key, value)
        and 0.0 <= p <= 1.0
        and (mask is None or (type(mask) in _dispatch._PLAIN and mask.device == query.device))
    )


def reasons(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, p: float,
    folded: Folded | None,
) -> list[str]:  # fmt: skip
    """`takes` and `fold` in words."""
    found = kernel_takes_not(key, value)
    if mask is not None:
        kind = type(mask)
        if kind not in _dispatch._PLAIN and not kind.__module__.startswith("torch._subclasses"):
            found.append(f"tensor subclass {kind.__name__} has its own rules")
        if mask.device != query.device:
            found.append(f"tensors on {query.device} and {mask.device}")
    if not 0.0 <= p <= 1.0:
        found.append(f"dropout_p is {p}, not a probability in [0, 1]")
    if folded is None:
        what = describe(query, key, value, mask)
        found.append(f"shapes, element types or options that do not fit together: {what}")
    return found


def result(like: torch.Tensor, width: int, heads_last: bool) -> torch.Tensor:
    """An empty tensor shaped as `like` but for its last size."""
    b, h, t, _ = like.shape
    if heads_last:
        return like.new_empty((b, t, h, width)).transpose(1, 2)
    return like.new_empty((b, h, t, width))
