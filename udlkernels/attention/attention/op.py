"""attention and scaled_dot_product_attention: choice of implementation, schemas, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels._philox import draw_seed
from udlkernels.attention.attention import checks, flex, reference, sdpa
from udlkernels.attention.attention.modifiers_fold import fold
from udlkernels.attention.attention.reference import NO_LIMIT, default_scale, limits

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    score_mod: Callable[..., torch.Tensor] | None = None,
    mask_mod: Callable[..., torch.Tensor] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    layout: str = "bhtd",
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    r"""Attention, with every usual change of its scores, in memory linear in the length.

    .. math:: o_i = \sum_j \frac{e^{s_{ij}}}{e^{\text{sink}_h} + \sum_l e^{s_{il}}} v_j, \qquad
        s_{ij} = \text{cap}(\text{mod}(\text{scale}\, q_i \cdot k_j))
        - \text{slope}_h |j - i - \delta| + b_{ij}

    over the keys j that query i sees, with cap(x) = softcap tanh(x / softcap) and mod the
    score_mod. The diagonal of query i is key i + delta: delta is S - T where causal is
    "bottom_right", else 0.

    What `udlkernels.attention.modifiers` makes runs on the kernels as the options that say the
    same; other functions run on PyTorch's flex_attention on a GPU, else in the formula.

    Args:
        q: [B, H, T, D], float32, float64, bfloat16 or float16; D up to 512 for the kernels.
        k: [B, Hkv, S, D] of q's type; Hkv divides H, and H / Hkv query heads in a row share a head.
        v: [B, Hkv, S, Dv] of q's type.
        causal: None, "top_left" (PyTorch's alignment) or "bottom_right" (FlashAttention's); query
            i then sees no key beyond its diagonal.
        window: (left, right), how many keys before and behind the diagonal a query sees, each an
            integer or None for all.
        mask: bool, broadcasts to [B, H, T, S]; True where a query sees a key.
        bias: floating point, broadcasts to [B, H, T, S], added to the scores; has a gradient. A
            bias of -inf hides the key.
        key_lengths: [B], int32 or int64; keys from there on are hidden.
        alibi_slopes: [H] or [B, H]; its gradient only with the formula.
        softcap: bound of the scores before slopes and bias; None or 0 for none.
        sinks: [H], one more logit for each row, which joins the denominator only; has a gradient.
        score_mod: score_mod(score, b, h, q_idx, kv_idx) -> score, as flex_attention's, of the
            scaled product, before softcap, slopes and bias; the formula gives its tensors
            gradients.
        mask_mod: mask_mod(b, h, q_idx, kv_idx) -> bool, as flex_attention's: True where a query
            sees a key, beside all other rules.
        scale: factor of the products; None for 1 / sqrt(D).
        dropout_p: probability with which a weight is dropped. Callers pass 0 in evaluation.
        seed: int64, one value, on q's device; None draws one from torch's generator. The mask is a
            function of the seed and a weight's place alone, not PyTorch's mask.
        layout: "bhtd", or "bthd" for q [B, T, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv].
        return_lse: also return the logarithm of each row's denominator; it has a gradient.
        implementation: "auto", "kernel", "reference", or "torch" with score_mod or mask_mod.

    Returns:
        [B, H, T, Dv] in the layout of q, contiguous, of q's type; with return_lse also the natural
        logarithm [B, H, T] in float32 (float64 for float64). A row that sees no key is 0, its
        logarithm -inf (or the sink).

    Raises:
        ArgumentError: shapes, types or devices that do not fit, an unknown causal or layout, a
            negative window, a mask or bias that does not broadcast, key lengths below 0 or above S
            (looked at on the CPU only), dropout_p outside [0, 1], a seed that is not one int64,
        tensors of a modifier that do not fit.

    Numerical error: products, softmax and sums in float32 (float64 for float64), around the row's
    largest score so far; what a query does not see is never multiplied, be it NaN. The backward
    finds the weights again from the rounded logarithm, to a relative |lse| times the type's
    epsilon, which a row with one dominant key multiplies in its gradients.

    Source: section 12.2; Vaswani et al., 2017; Dao et al., 2022, "FlashAttention".
    """
    if torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
        q, k, v = _autocast(q, k, v)
    heads_last = layout == "bthd"
    if not heads_last and layout != "bhtd":
        raise ArgumentError("attention", "layout", "'bhtd' or 'bthd'", repr(layout))
    if not checks.fits(q, k, v, heads_last):
        checks.check_tensors(q, k, v, heads_last)
    if heads_last:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not (
        mask is bias is key_lengths is alibi_slopes is sinks is seed is None
        and causal is window is softcap is scale is None
        and dropout_p == 0.0
    ):
        checks.check_options(
            q, k, causal, window, softcap, scale, dropout_p,
            mask, bias, key_lengths, alibi_slopes, sinks, seed,
        )  # fmt: skip
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(q)
    bounds = limits(causal, window, q.shape[2], k.shape[2])
    factor = default_scale(q) if scale is None else scale
    folded = None
    if score_mod is not None or mask_mod is not None:
        folded = fold(
            q, k, score_mod, mask_mod, mask, key_lengths, alibi_slopes, bounds, softcap or 0.0
        )
    slopes = alibi_slopes if folded is None else folded.alibi_slopes
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(q, k, v, bias, sinks)
        and sdpa.kernel_takes(k, v)
        and not needs_grad(slopes)
        and (folded is None or not folded.reasons)
    ):
        reasons = kernel_reasons(q, k, v, bias, sinks) + sdpa.kernel_takes_not(k, v)
        torch_reasons = ["PyTorch has no such op"]
        if needs_grad(slopes):
            reasons.append("alibi_slopes needs a gradient")
        if folded is not None:
            reasons += folded.reasons
            torch_reasons = flex.reasons(q, k, v, mask, bias, sinks, dropout_p, return_lse)
        choice = choose(
            "attention",
            implementation,
            reasons,
            fallback="torch" if q.is_cuda else "reference",
            torch_reasons=torch_reasons,
            inputs=describe(q, k, v),
        )
        if choice != "kernel":
            if choice == "torch":
                found = flex.attend(
                    q, k, v, score_mod, mask_mod, key_lengths, alibi_slopes, *bounds, factor,
                    softcap or 0.0, return_lse,
                )  # fmt: skip
            else:
                found = reference.attend(
                    q, k, v, mask, bias, key_lengths, alibi_slopes, sinks, seed, *bounds, factor,
                    softcap or 0.0, dropout_p, score_mod=score_mod, mask_mod=mask_mod,
                )  # fmt: skip
            out = found[0].transpose(1, 2) if heads_last else found[0]
            return (out, found[1]) if return_lse else out
    ranges = None
    if folded is not None:
        mask, key_lengths, ranges = folded.mask, folded.key_lengths, folded.ranges
        bounds, softcap = folded.limits, folded.softcap
    found = _attend(
        q, k, v, mask, bias, key_lengths, slopes, sinks, *bounds, factor, softcap or 0.0,
        dropout_p, seed, heads_last, return_lse, ranges,
    )  # fmt: skip
    out = found[0] if return_lse else found
    out = out.transpose(1, 2) if heads_last else out
    return (out, found[1]) if return_lse else out


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Attention as torch.nn.functional's, in memory linear in the length with every mask.

    .. math:: \text{softmax}(\text{scale}\, Q K^\top + M) V

    Args:
        query: [..., H, L, E]; float32, float64, bfloat16 or float16 for the kernels, and whatever
            else PyTorch's op takes.
        key: [..., H, S, E] of query's type.
        value: [..., H, S, Ev] of query's type. Leading dimensions broadcast.
        attn_mask: bool (True where a query sees a key), or added to the scores, of query's type or
            float32; broadcasts to [..., H, L, S]. What is added has a gradient.
        dropout_p: probability with which a weight is dropped, in evaluation too. The mask comes
            from torch's generator, but is not PyTorch's mask.
        is_causal: query i sees the keys up to i, whatever L and S; not beside attn_mask.
        scale: factor of the products; None for 1 / sqrt(E).
        enable_gqa: key and value may have fewer heads, which divide query's.
        implementation: "auto", "kernel", "torch" or "reference".

    Returns:
        [..., H, L, Ev] of query's type, contiguous, or [B, L, H, Ev] in memory where query lies
        so. A row that sees no key is 0.

    Raises:
        ArgumentError: an unknown `implementation`, or one that cannot serve.
        RuntimeError, TypeError, IndexError: as torch.nn.functional.scaled_dot_product_attention.

    Numerical error: as attention.

    Source: section 12.2; Vaswani et al., 2017; Dao et al., 2022, "FlashAttention".
    """
    if torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu"):
        query, key, value = _autocast(query, key, value)
    folded: Any = None
    if implementation in ("auto", "kernel") and kernel_ready(query, key, value):
        if attn_mask is None and dropout_p == 0.0 and sdpa.alike(query, key, value):
            folded = query, key, value, None, None, None
        elif sdpa.takes(query, key, value, attn_mask, dropout_p):
            folded = sdpa.fold(query, key, value, attn_mask, is_causal, enable_gqa)
    if folded is None:
        folded = sdpa.fold(query, key, value, attn_mask, is_causal, enable_gqa)
        choice = choose(
            "scaled_dot_product_attention",
            implementation,
            kernel_reasons(query, key, value)
            + sdpa.reasons(query, key, value, attn_mask, dropout_p, folded),
            inputs=describe(query, key, value, attn_mask),
        )
        if choice == "torch":
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        if choice == "reference":
            seed = draw_seed(query) if dropout_p > 0.0 else None
            return reference.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, seed=seed
            )
    q, k, v, mask, bias, leading = folded
    out = _attend(
        q, k, v, mask, bias, None, None, None, 0, NO_LIMIT, 0 if is_causal else NO_LIMIT,
        default_scale(q) if scale is None else scale, 0.0, dropout_p,
        draw_seed(q) if dropout_p > 0.0 else None,
        leading is None and q.stride(1) < q.stride(2), False,
    )  # fmt: skip
    return out if leading is None else out.reshape(*leading, *out.shape[2:])


def _autocast(*tensors: torch.Tensor) -> Any:
    """As PyTorch's op under autocast, which is on."""
    dtype = torch.get_autocast_dtype("cuda" if tensors[0].is_cuda else "cpu")
    return tuple(t.to(dtype) if t.dtype in _AUTOCAST_DTYPES else t for t in tensors)


def _wide(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _attend(
    q: Any, k: Any, v: Any, mask: Any, bias: Any, key_lengths: Any, alibi_slopes: Any, sinks: Any,
    offset: int, left: int, right: int, scale: float, softcap: float, dropout_p: float, seed: Any,
    heads_last: bool, with_lse: bool, ranges: Any = None, block_mask: Any = None,
    block_size: int = 0,
) -> Any:  # fmt: skip
    """The kernels, on tensors and options that fit: out, or (out, lse) with_lse.

    ranges: int64, broadcasts to [B, T, 2]; a query sees no key outside of its [low, high).
    block_mask: bool, broadcasts to [B, H, ceil(T / block_size), ceil(S / block_size)].
    """
    if q.stride(3) != 1:
        q = q.contiguous()
    if k.stride(3) != 1:
        k = k.contiguous()
    if v.stride(3) != 1:
        v = v.contiguous()
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    if bias is not None:
        bias = _four_dims(bias, q)
    if key_lengths is not None:
        key_lengths = key_lengths.to(torch.int64).contiguous()
    if alibi_slopes is not None:
        alibi_slopes = _wide(alibi_slopes, q).expand(q.shape[:2]).contiguous()
    if sinks is not None:
        sinks = _wide(sinks, q).contiguous()
    if ranges is not None:
        ranges = ranges.to(torch.int64).contiguous().expand(q.shape[0], q.shape[2], 2)
    if block_mask is not None:
        block_mask = block_mask.expand(*q.shape[:2], *block_mask.shape[-2:])
    if dropout_p == 0.0:
        seed = None
    args = offset, left, right, scale, softcap, dropout_p
    if needs_grad(q, k, v, bias, sinks):
        return _Attention.apply(
            q, k, v, bias, sinks, mask, key_lengths, alibi_slopes, ranges, block_mask, seed,
            block_size, *args, heads_last, with_lse,
        )  # fmt: skip
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    found = FWD(
        q, k, v, mask, bias, key_lengths, alibi_slopes, sinks, ranges, block_mask, block_size,
        *args, seed, heads_last,
    )  # fmt: skip
    return found if with_lse else found[0]


def _four_dims(bias: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The bias with four dimensions, of a type that the kernels take.

    They return the gradient summed over every dimension of stride 0, which must be of size 1 here.
    """
    if bias.dtype != q.dtype and (bias.dtype != torch.float32 or q.dtype == torch.float64):
        bias = _wide(bias, q)
    bias = bias[(None,) * (4 - bias.dim())]
    if needs_grad(bias) and any(
        n != 1 and stride == 0 for n, stride in zip(bias.shape, bias.stride(), strict=True)
    ):
        bias = bias.contiguous()
    return bias


def _fake_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = sdpa.result(q, v.shape[3], args[-1])
    return out, q.new_empty(q.shape[:3], dtype=dtype)


def _fake_bwd(dout: Any, dlse: Any, q: Any, k: Any, v: Any, *args: Any) -> Any:
    bias, sinks = args[3], args[6]
    heads_last, need_dq, need_dkv, need_dbias, need_dsinks = args[-5:]

    def nothing() -> torch.Tensor:
        return q.new_empty((0,), dtype=torch.float32)

    def like(x: torch.Tensor, wanted: bool) -> torch.Tensor:
        return sdpa.result(x, x.shape[3], heads_last) if wanted else nothing()

    dbias, dsinks = nothing(), nothing()
    if need_dbias:
        sizes = zip(bias.shape, bias.stride(), strict=True)
        dbias = bias.new_empty([1 if n == 1 or stride == 0 else n for n, stride in sizes])
    if need_dsinks:
        dsinks = sinks.new_empty(sinks.shape)
    return like(q, need_dq), like(k, need_dkv), like(v, need_dkv), dbias, dsinks


FWD = _library.define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? key_lengths,"
    " Tensor? alibi_slopes, Tensor? sinks, Tensor? ranges, Tensor? block_mask, int block_size,"
    " SymInt offset, int left, int right, float scale, float softcap, float dropout_p,"
    " Tensor? seed, bool heads_last) -> (Tensor out, Tensor lse)",
    _fake_fwd,
)
BWD = _library.define(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor? mask, Tensor? bias, Tensor? key_lengths, Tensor? alibi_slopes,"
    " Tensor? sinks, Tensor? ranges, Tensor? block_mask, int block_size, SymInt offset, int left,"
    " int right, float scale, float softcap, float dropout_p, Tensor? seed, bool heads_last,"
    " bool need_dq, bool need_dkv, bool need_dbias, bool need_dsinks)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    _fake_bwd,
)
_library.launchers("udlkernels.attention.attention.kernels", "attention_fwd", "attention_bwd")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, bias: Any, sinks: Any, mask: Any, key_lengths: Any,
        alibi_slopes: Any, ranges: Any, block_mask: Any, seed: Any, block_size: int, offset: int,
        left: int, right: int, scale: float, softcap: float, dropout_p: float, heads_last: bool,
        with_lse: bool,
    ) -> Any:  # fmt: skip
        wide = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
        args = offset, left, right, scale, softcap, dropout_p
        out, lse = FWD(
            q, k, v, mask, wide, key_lengths, alibi_slopes, sinks, ranges, block_mask, block_size,
            *args, seed, heads_last,
        )  # fmt: skip
        ctx.save_for_backward(
            q, k, v, bias, sinks, out, lse, mask, key_lengths, alibi_slopes, ranges, block_mask,
            seed,
        )  # fmt: skip
        ctx.args = args, block_size, heads_last
        ctx.set_materialize_grads(False)
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> Any:
        q, k, v, bias, sinks, out, lse, mask, key_lengths, alibi_slopes, *more = ctx.saved_tensors
        ranges, block_mask, seed = more
        args, block_size, heads_last = ctx.args
        wanted = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            sparse = dict(ranges=ranges, block_mask=block_mask, block_size=block_size)

            def formula(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
                return reference.attend(
                    q, k, v, mask, bias, key_lengths, alibi_slopes, sinks, seed, *args, **sparse
                )

            grads = dout, dlse
            found = _dispatch.differentiate(formula, (q, k, v, bias, sinks), wanted, grads)
            return *found, *(None,) * 15
        if dout is None:
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        need_dq, need_dk, need_dv, need_dbias, need_dsinks = wanted
        if bias is not None:
            bias = bias.expand(*q.shape[:3], k.shape[2])
        dq, dk, dv, dbias, dsinks = BWD(
            dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse, mask, bias,
            key_lengths, alibi_slopes, sinks, ranges, block_mask, block_size, *args, seed,
            heads_last, need_dq, need_dk or need_dv, need_dbias, need_dsinks,
        )  # fmt: skip
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            dbias if need_dbias else None,
            dsinks if need_dsinks else None,
            *(None,) * 15,
        )
