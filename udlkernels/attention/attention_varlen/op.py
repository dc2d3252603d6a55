"""attention_varlen: choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._philox import draw_seed
from udlkernels.attention.attention import sdpa
from udlkernels.attention.attention.op import _autocast, _wide
from udlkernels.attention.attention.reference import default_scale, limits
from udlkernels.attention.attention_varlen import checks, reference


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    r"""Attention within each of many sequences that lie one behind the other, without padding.

    .. math:: o_i = \sum_j \frac{e^{s_{ij}}}{e^{\text{sink}_h} + \sum_l e^{s_{il}}} v_j, \qquad
        s_{ij} = \text{cap}(\text{scale}\, q_i \cdot k_j) - \text{slope}_h |j - i - \delta|

    as in attention, over the keys j of query i's own sequence, in which both are counted from its
    start. delta is the sequence's keys less its queries where causal is "bottom_right", else 0.

    Args:
        q: [Nq, H, D], float32, float64, bfloat16 or float16; D up to 512 for the kernels.
        k: [Nk, Hkv, D] of q's type; Hkv divides H.
        v: [Nk, Hkv, Dv] of q's type.
        cu_seqlens_q: [B + 1], int32 or int64: where the sequences start in q, and where the last
            one ends. From 0, not decreasing, up to Nq; a sequence may be empty.
        cu_seqlens_k: [B + 1], the same for k and v.
        causal: None, "top_left" or "bottom_right", in each sequence with its own lengths.
        window: (left, right), how many keys before and behind the diagonal a query sees, each an
            integer or None for all.
        alibi_slopes: [H] or [B, H]; its gradient only with the formula.
        softcap: bound of the scores before the slopes; None or 0 for none.
        sinks: [H], one more logit for each row, which joins the denominator only; has a gradient.
        scale: factor of the products; None for 1 / sqrt(D).
        dropout_p: probability with which a weight is dropped. Callers pass 0 in evaluation.
        seed: int64, one value, on q's device; None draws one from torch's generator.
        return_lse: also return the logarithm of each row's denominator; it has a gradient.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [Nq, H, Dv], contiguous, of q's type; with return_lse also the natural logarithm [H, Nq] in
        float32 (float64 for float64). A row that sees no key is 0, its logarithm -inf (or the
        sink); so are rows behind the last sequence, without a sink.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, ends of sequences that decrease or
            leave the rows (looked at on the CPU only), an unknown causal, a negative window,
            dropout_p outside [0, 1], a seed that is not one int64.

    Numerical error: as attention; without dropout each sequence gets the bits that attention gives
    it alone, and its gradients too.

    Source: section 12.2; Dao et al., 2022, "FlashAttention"; Krell et al., 2021, "Efficient
    Sequence Packing without Cross-contamination".
    """
    if torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
        q, k, v = _autocast(q, k, v)
    if not checks.fits(q, k, v):
        checks.check_tensors(q, k, v)
    checks.check_sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    if not (
        alibi_slopes is sinks is seed is causal is window is softcap is scale is None
        and dropout_p == 0.0
    ):
        checks.check_options(
            q, len(cu_seqlens_q) - 1, causal, window, softcap, scale, dropout_p, alibi_slopes,
            sinks, seed,
        )  # fmt: skip
        if dropout_p > 0.0 and seed is None:
            seed = draw_seed(q)
    _, left, right = limits(causal, window, 0, 0)
    args = (
        int(causal == "bottom_right"), left, right, default_scale(q) if scale is None else scale,
        softcap or 0.0, dropout_p, seed if dropout_p > 0.0 else None,
    )  # fmt: skip
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(q, k, v, sinks)
        and sdpa.kernel_takes(k, v)
        and not needs_grad(alibi_slopes)
    ):
        reasons = kernel_reasons(q, k, v, sinks) + sdpa.kernel_takes_not(k, v)
        if needs_grad(alibi_slopes):
            reasons.append("alibi_slopes needs a gradient")
        choice = choose(
            "attention_varlen",
            implementation,
            reasons,
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(q, k, v),
        )
        if choice == "reference":
            found = reference.attend_packed(
                q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, *args
            )
            return found if return_lse else found[0]
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, args, return_lse)


def _attend(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, alibi_slopes: Any, sinks: Any, args: Any,
    with_lse: bool,
) -> Any:  # fmt: skip
    """The kernels, on tensors and options that fit: out, or (out, lse) with_lse."""
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    cu_q, cu_k = (t.to(torch.int64).contiguous() for t in (cu_q, cu_k))
    if alibi_slopes is not None:
        alibi_slopes = _wide(alibi_slopes, q).expand(len(cu_q) - 1, q.shape[1]).contiguous()
    if sinks is not None:
        sinks = _wide(sinks, q).contiguous()
    if needs_grad(q, k, v, sinks):
        return _AttentionVarlen.apply(q, k, v, sinks, cu_q, cu_k, alibi_slopes, *args, with_lse)
    found = FWD(q, k, v, cu_q, cu_k, alibi_slopes, sinks, *args)
    return found if with_lse else found[0]


def _fake_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, heads, _ = q.shape
    return q.new_empty((rows, heads, v.shape[2])), q.new_empty((heads, rows), dtype=dtype)


def _fake_bwd(dout: Any, dlse: Any, q: Any, k: Any, v: Any, *args: Any) -> Any:
    sinks = args[5]
    need_dq, need_dkv, need_dsinks = args[-3:]

    def like(x: Any, wanted: bool) -> torch.Tensor:
        return x.new_empty(x.shape) if wanted else q.new_empty((0,), dtype=torch.float32)

    return like(q, need_dq), like(k, need_dkv), like(v, need_dkv), like(sinks, need_dsinks)


FWD = _library.define(
    "attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " Tensor? alibi_slopes, Tensor? sinks, int causal, int left, int right, float scale,"
    " float softcap, float dropout_p, Tensor? seed) -> (Tensor out, Tensor lse)",
    _fake_fwd,
)
BWD = _library.define(
    "attention_varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks,"
    " int causal, int left, int right, float scale, float softcap, float dropout_p, Tensor? seed,"
    " bool need_dq, bool need_dkv, bool need_dsinks)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    _fake_bwd,
)
_library.launchers(
    "udlkernels.attention.attention_varlen.kernels", "attention_varlen_fwd", "attention_varlen_bwd"
)


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, sinks: Any, cu_q: Any, cu_k: Any, alibi_slopes: Any,
        causal: int, left: int, right: int, scale: float, softcap: float, dropout_p: float,
        seed: Any, with_lse: bool,
    ) -> Any:  # fmt: skip
        numbers = causal, left, right, scale, softcap, dropout_p
        out, lse = FWD(q, k, v, cu_q, cu_k, alibi_slopes, sinks, *numbers, seed)
        ctx.save_for_backward(q, k, v, sinks, out, lse, cu_q, cu_k, alibi_slopes, seed)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)
        return (out, lse) if with_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> Any:
        q, k, v, sinks, out, lse, cu_q, cu_k, alibi_slopes, seed = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        args: Any = (*ctx.numbers, seed)
        if torch.is_grad_enabled():

            def formula(q: Any, k: Any, v: Any, sinks: Any) -> Any:
                return reference.attend_packed(q, k, v, cu_q, cu_k, alibi_slopes, sinks, *args)

            grads = dout, dlse
            return *_dispatch.differentiate(formula, (q, k, v, sinks), wanted, grads), *(None,) * 11
        if dout is None:
            dout = torch.zeros_like(out)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        need_dq, need_dk, need_dv, need_dsinks = wanted
        dq, dk, dv, dsinks = BWD(
            dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse, cu_q, cu_k,
            alibi_slopes, sinks, *args, need_dq, need_dk or need_dv, need_dsinks,
        )  # fmt: skip
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            dsinks if need_dsinks else None,
            *(None,) * 11,
        )
