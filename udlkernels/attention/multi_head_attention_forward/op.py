"""multi_head_attention_forward: choice of implementation; the kernels are those of attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons
from udlkernels.attention.attention import sdpa
from udlkernels.attention.attention.op import attention
from udlkernels.attention.multi_head_attention_forward import checks, reference


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""Multi-head attention as torch.nn.functional's: projections, attention, projection.

    .. math:: \text{concat}_h\big(\text{softmax}(Q_h K_h^\top / \sqrt{D} + M) V_h\big) W_o + b_o,
        \qquad Q = x_q W_q + b_q, \; K = x_k W_k + b_k, \; V = x_v W_v + b_v

    Args:
        query: [L, N, E], or [L, E] for one sample; float32, float64, bfloat16 or float16 for the
            kernels, and whatever else PyTorch's function takes.
        key: [S, N, E] or [S, E]; with separate weights of any width.
        value: as key, of any width with separate weights.
        embed_dim_to_check: E.
        num_heads: H, divides E.
        in_proj_weight: [3 E, E], the weights of query, key and value.
        in_proj_bias: [3 E] or None.
        bias_k, bias_v: [1, 1, E] or None, one more key and value, behind the projected ones.
        add_zero_attn: whether a key and a value of zeros follow them.
        dropout_p: probability with which a weight is dropped where `training` is True.
        out_proj_weight: [Eo, E].
        out_proj_bias: [Eo] or None.
        training: whether dropout is on.
        key_padding_mask: [N, S] or [S]; bool (True hides the key) or added to its scores.
        need_weights: whether the weights are returned too, in memory of L times S.
        attn_mask: [L, S] or [N H, L, S]; bool (True hides) or added to the scores. What is added
            has a gradient.
        use_separate_proj_weight: whether the next three stand for in_proj_weight.
        q_proj_weight, k_proj_weight, v_proj_weight: [E, E], [E, Ek] and [E, Ev].
        static_k, static_v: [N H, S, D] in place of the projected heads.
        average_attn_weights: whether the weights are the heads' mean.
        is_causal: says that attn_mask is the causal one, which then is not read where neither
            padding nor weights are asked for.
        implementation: "auto", "kernel", "torch" or "reference".

    Returns:
        [L, N, Eo] or [L, Eo], of query's type, contiguous, or with N first in memory where query
        lies so; and the weights, [N, L, S] or [N, H, L, S] less N for one sample, or None.

    Raises:
        ArgumentError: an unknown `implementation`, or one that cannot serve.
        RuntimeError, AssertionError: as torch.nn.functional.multi_head_attention_forward.

    Numerical error: as attention, between PyTorch's products. A row that sees no key is 0, or NaN
    where the weights are needed, as in PyTorch. Padded keys may hold anything, NaN too, without a
    trace in results and gradients, except as queries of their own in self-attention. With both
    weights and dropout the formula serves, with PyTorch's dropout.

    Source: section 12.3; Vaswani et al., 2017, "Attention Is All You Need".
    """
    args = (
        query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k,
        bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training,
        key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
        k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights, is_causal,
    )  # fmt: skip
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else (
        in_proj_weight,
    )  # fmt: skip
    tensors = (
        query, key, value, *weights, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias,
        static_k, static_v,
    )  # fmt: skip
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(*tensors)
        and not (need_weights and training and dropout_p > 0.0)
        and _one_type(tensors)
        and not checks.mismatch(*args)
        and _fits_kernel(query, key, num_heads)
    ):
        choice, fits = _choose(args, tensors, implementation)
        if choice == "torch" or not fits:
            return F.multi_head_attention_forward(*args)
        if choice == "reference":
            return reference.multi_head_attention_forward(*args)
    attend = functools.partial(attention, implementation=implementation)
    return reference.multi_head_attention_forward(*args, attend=attend)


def _one_type(tensors: tuple[Any, ...]) -> bool:
    """Whether the products can be formed: autocast makes of several types one."""
    first = tensors[0]
    if torch.is_autocast_enabled("cuda" if first.is_cuda else "cpu"):
        return True
    return all(x is None or x.dtype == first.dtype for x in tensors)


def _fits_kernel(query: Tensor, key: Tensor, num_heads: int) -> bool:
    heads = query.unflatten(-1, (num_heads, -1))
    return key.numel() != 0 and sdpa.kernel_takes(heads, heads)


def _choose(args: Any, tensors: Any, implementation: str) -> tuple[str, bool]:
    """The choice in words, and whether the arguments fit together."""
    query, key, _, _, num_heads, *_ = args
    reasons = kernel_reasons(*tensors)
    misfit = checks.mismatch(*args)
    if not misfit and not _one_type(tensors):
        misfit = f"several element types: {describe(*tensors)}"
    if misfit:
        reasons.append(misfit)
    elif not _fits_kernel(query, key, num_heads):
        heads = query.unflatten(-1, (num_heads, -1))
        reasons += sdpa.kernel_takes_not(heads, heads) or ["the keys have no elements"]
    fallback = "torch" if reasons else "reference"
    training, need_weights, dropout_p = args[13], args[15], args[10]
    if need_weights and training and dropout_p > 0.0:
        reasons.append("weights after dropout, which the kernels never write out")
    choice = choose(
        "multi_head_attention_forward",
        implementation,
        list(dict.fromkeys(reasons)),
        fallback,
        inputs=describe(*args[:3]),
    )
    return choice, not misfit
