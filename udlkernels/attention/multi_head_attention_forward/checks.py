"""Whether the arguments of multi-head attention fit together, in words where they do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from udlkernels import _dispatch


def mismatch(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Any, in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool,
    dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Any, training: bool,
    key_padding_mask: Any, need_weights: bool, attn_mask: Any, use_separate_proj_weight: bool,
    q_proj_weight: Any, k_proj_weight: Any, v_proj_weight: Any, static_k: Any, static_v: Any,
    average_attn_weights: bool, is_causal: bool,
) -> str:  # fmt: skip
    """What does not fit, or nothing. PyTorch's function then has its own answer."""
    rank = query.dim()
    if not (rank in (2, 3) and key.dim() == value.dim() == rank):
        return "query, key and value are not all [L, N, E] or all [L, E]"
    batch, width = query.shape[1] if rank == 3 else 1, query.shape[-1]
    if key.shape[:-1] != value.shape[:-1] or (rank == 3 and key.shape[1] != batch):
        return "query, key and value have other lengths or batches"
    if not (num_heads > 0 and width == embed_dim_to_check and width % num_heads == 0):
        return f"query is {width} wide, of {embed_dim_to_check} in {num_heads} heads"
    found = ""
    if use_separate_proj_weight:
        found = (
            _shape("q_proj_weight", q_proj_weight, (width, width))
            or _shape("k_proj_weight", k_proj_weight, (width, key.shape[-1]))
            or _shape("v_proj_weight", v_proj_weight, (width, value.shape[-1]))
        )
    elif not (key.shape[-1] == value.shape[-1] == width):
        found = "key or value have another width than query"
    else:
        found = _shape("in_proj_weight", in_proj_weight, (3 * width, width))
    if found:
        return found
    if in_proj_bias is not None and in_proj_bias.shape != (3 * width,):
        return f"in_proj_bias is not [{3 * width}]"
    if out_proj_weight.dim() != 2 or out_proj_weight.shape[1] != width:
        return f"out_proj_weight is not [..., {width}]"
    if out_proj_bias is not None and out_proj_bias.shape != out_proj_weight.shape[:1]:
        return "out_proj_bias is not as long as out_proj_weight"
    if not 0.0 <= dropout_p <= 1.0:
        return f"dropout_p is {dropout_p}, not a probability in [0, 1]"
    keys = key.shape[0]
    if not (bias_k is bias_v is static_k is static_v is None):
        found = _more_keys(bias_k, bias_v, static_k, static_v, (batch, num_heads, keys, width))
        keys = keys if static_k is None else static_k.shape[1]
    if found or (attn_mask is key_padding_mask is None and not is_causal):
        return found
    lengths = query.shape[0], key.shape[0], keys
    return _masks(query, key_padding_mask, attn_mask, is_causal, batch, num_heads, lengths)


def _shape(name: str, x: Any, shape: tuple[int, ...]) -> str:
    return "" if x is not None and x.shape == shape else f"{name} is not {list(shape)}"


def _more_keys(
    bias_k: Any, bias_v: Any, static_k: Any, static_v: Any, sizes: tuple[int, int, int, int]
) -> str:
    batch, heads, keys, width = sizes
    if not (bias_k is bias_v is None):
        if not (static_k is static_v is None):
            return "bias_k beside static_k"
        shape = (1, 1, width)
        return _shape("bias_k", bias_k, shape) or _shape("bias_v", bias_v, shape)
    if static_k is not None and static_k.dim() == 3:
        keys = static_k.shape[1]
    shape = (batch * heads, keys, width // heads)
    for name, x in (("static_k", static_k), ("static_v", static_v)):
        if x is not None and x.shape != shape:
            return f"{name} is not {list(shape)}"
    return ""


def _masks(
    query: Tensor, key_padding_mask: Any, attn_mask: Any, is_causal: bool, batch: int, heads: int,
    lengths: tuple[int, int, int],
) -> str:  # fmt: skip
    rows, own_keys, keys = lengths
    if is_causal and attn_mask is None:
        return "is_causal without attn_mask"
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is None:
            continue
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            return f"{name} is {mask.dtype}"
        kind = type(mask)
        if kind not in _dispatch._PLAIN and not kind.__module__.startswith("torch._subclasses"):
            return f"tensor subclass {kind.__name__} has its own rules"
        if mask.device != query.device:
            return f"tensors on {query.device} and {mask.device}"
    if key_padding_mask is not None and key_padding_mask.shape != (
        (batch, keys) if query.dim() == 3 else (keys,)
    ):
        return f"key_padding_mask is not [{batch}, {keys}]"
    if attn_mask is not None and (
        keys != own_keys or attn_mask.shape not in ((rows, keys), (batch * heads, rows, keys))
    ):
        return f"attn_mask is not [{rows}, {own_keys}] or [{batch * heads}, {rows}, {own_keys}]"
    return ""
