"""The formula of multi-head attention in plain torch, around any attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from udlkernels._philox import draw_seed
from udlkernels.attention.attention import reference
from udlkernels.attention.multi_head_attention_forward import parts


def multi_head_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Any, in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool,
    dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Any, training: bool = True,
    key_padding_mask: Any = None, need_weights: bool = True, attn_mask: Any = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Any = None, k_proj_weight: Any = None,
    v_proj_weight: Any = None, static_k: Any = None, static_v: Any = None,
    average_attn_weights: bool = True, is_causal: bool = False, *,
    attend: Callable[..., Tensor] = reference.attention,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    batched = query.dim() == 3
    if not batched:
        query, key, value = parts.each(lambda x: x.unsqueeze(1), query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    is_causal = is_causal and key_padding_mask is None and not need_weights
    attn_mask = None if is_causal else attn_mask
    padding = key_padding_mask
    if padding is not None and padding.dtype != torch.bool:
        padding = padding == -math.inf
    if padding is not None and key is not query and static_k is static_v is None:
        key, value = parts.hide_rows(key, value, padding)
    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = parts.project(query, key, value, num_heads, in_proj_weight, in_proj_bias, separate)
    k = k if static_k is None else parts.unfold_heads(static_k, num_heads)
    v = v if static_v is None else parts.unfold_heads(static_v, num_heads)
    if need_weights and padding is not None:
        k, v = (x.masked_fill(padding[..., None, None], 0.0) for x in (k, v))
    k, v, appended = parts.append_keys(k, v, bias_k, bias_v, add_zero_attn)
    masks = parts.fold_masks(key_padding_mask, attn_mask, num_heads, appended, query.dtype)
    heads, weights = _attend(q, k, v, *masks, is_causal, dropout_p * training, need_weights, attend)
    out = parts.project_out(heads, out_proj_weight, out_proj_bias, query)
    if weights is not None:
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    return out if batched else out.squeeze(1), weights


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, is_causal: bool, dropout_p: float,
    need_weights: bool, attend: Callable[..., Tensor],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The heads' result [N, L, H, D], and the weights [N, H, L, S] where they are needed."""
    weights = parts.attention_weights(q, k, mask, bias) if need_weights else None
    if weights is not None and dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
        return (weights @ v.transpose(1, 2)).transpose(1, 2), weights
    heads = attend(
        q, k, v, causal="top_left" if is_causal else None, mask=mask, bias=bias,
        dropout_p=dropout_p, seed=draw_seed(q) if dropout_p > 0.0 else None, layout="bthd",
    )  # fmt: skip
    if weights is not None and not (mask is bias is None):
        # PyTorch's rows that see no key are NaN beside the weights, and 0 without them.
        empty = weights[..., :1].isnan().transpose(1, 2)
        heads = heads.masked_fill(empty, math.nan)
    return heads, weights
