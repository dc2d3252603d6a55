"""The parts of multi-head attention around the attention: projections, masks, weights.

Between the projections the heads are [N, L, H, D], views of what the projections gave.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Three = tuple[Tensor, Tensor, Tensor]


def each(function: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor) -> Three:
    """The function of all three; what was one tensor stays one, and one projection serves it."""
    q = function(query)
    k = q if key is query else function(key)
    return q, k, k if value is key else function(value)


def hide_rows(key: Tensor, value: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros in the rows that are padding: a NaN there would reach the weights' gradients."""
    rows = padding.t()[..., None]
    key, _, value = each(lambda x: x.masked_fill(rows, 0.0), key, key, value)
    return key, value


def project(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, weight: Any, bias: Any,
    separate: Any,
) -> Three:  # fmt: skip
    """query, key and value [L, N, E] as heads, by one packed weight or three `separate` ones."""
    width = query.shape[-1]
    if separate is None and key is value:
        if query is key:
            q, k, v = _heads(_linear(query, weight, bias), 3, num_heads)
            return q, k, v
        sizes = [width, 2 * width]
        weights = weight.split(sizes)
        biases = (None, None) if bias is None else bias.split(sizes)
        (q,) = _heads(_linear(query, weights[0], biases[0]), 1, num_heads)
        k, v = _heads(_linear(key, weights[1], biases[1]), 2, num_heads)
        return q, k, v
    weights = weight.chunk(3) if separate is None else separate
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (
        _heads(_linear(x, w, b), 1, num_heads)[0]
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    return q, k, v


def project_out(heads: Tensor, weight: Tensor, bias: Any, query: Tensor) -> Tensor:
    """heads [N, L, H, D] as [L, N, E], with the batch first in memory where it is so in query."""
    rows = heads.flatten(2)
    if _batch_first(query):
        return F.linear(rows, weight, bias).transpose(0, 1)
    return F.linear(rows.transpose(0, 1), weight, bias)


def _batch_first(x: Tensor) -> bool:
    return not x.is_contiguous() and x.transpose(0, 1).is_contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    """The linear map of [L, N, E], on rows in the order in which they lie: no copy of them."""
    if _batch_first(x):
        return F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    return F.linear(x, weight, bias)


def _heads(x: Tensor, count: int, num_heads: int) -> tuple[Tensor, ...]:
    """[L, N, count * E] as `count` tensors [N, L, H, D]."""
    return x.unflatten(-1, (count, num_heads, -1)).transpose(0, 1).unbind(2)


def unfold_heads(x: Tensor, num_heads: int) -> Tensor:
    """[N * H, S, D] as [N, S, H, D]."""
    return x.unflatten(0, (-1, num_heads)).transpose(1, 2)


def append_keys(
    k: Tensor, v: Tensor, bias_k: Any, bias_v: Any, zero: bool
) -> tuple[Tensor, Tensor, int]:
    """k and v with the learned key and the zero key behind them, and how many these are."""
    shape = (k.shape[0], 1, *k.shape[2:])
    more_k, more_v = [], []
    if bias_k is not None:
        more_k.append(bias_k.to(k.dtype).view(1, *shape[1:]).expand(shape))
        more_v.append(bias_v.to(v.dtype).view(1, *shape[1:]).expand(shape))
    if zero:
        more_k.append(k.new_zeros(shape))
        more_v.append(v.new_zeros(shape))
    if more_k:
        k, v = torch.cat([k, *more_k], 1), torch.cat([v, *more_v], 1)
    return k, v, len(more_k)


def fold_masks(
    key_padding_mask: Any, attn_mask: Any, num_heads: int, appended: int, dtype: torch.dtype
) -> tuple[Any, Any]:
    """PyTorch's two masks as a boolean one (True: sees) and an added one, both of them unexpanded.

    Nothing of the size of the scores is made, except of an added mask beside a float padding.
    """
    mask = bias = None
    if attn_mask is not None:
        whole = F.pad(attn_mask, (0, appended)) if appended else attn_mask
        whole = whole if whole.dim() == 2 else whole.unflatten(0, (-1, num_heads))
        mask, bias = (~whole, None) if whole.dtype == torch.bool else (None, whole)
    if key_padding_mask is not None:
        row = F.pad(key_padding_mask, (0, appended)) if appended else key_padding_mask
        row = row[:, None, None]
        if row.dtype != torch.bool:
            bias = row if bias is None else bias + row
        elif mask is None:
            mask = ~row
        else:
            bias = torch.zeros_like(row, dtype=dtype).masked_fill(row, -math.inf)
    return mask, bias


def attention_weights(q: Tensor, k: Tensor, mask: Any, bias: Any) -> Tensor:
    """[N, H, L, S], by the formula; a row that sees no key is NaN, as in PyTorch."""
    scores = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
    hidden = None if mask is None else ~mask
    if bias is not None:
        scores.add_(bias)
        minus = bias == -math.inf
        hidden = minus if hidden is None else hidden | minus
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    return scores.softmax(-1)
