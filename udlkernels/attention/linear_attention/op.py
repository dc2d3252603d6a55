"""linear_attention: choice of implementation, schemas, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels.attention.attention.op import _autocast
from udlkernels.attention.linear_attention import reference
from udlkernels.attention.linear_attention.checks import OP, check
from udlkernels.attention.linear_attention.reference import FEATURE_MAPS


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str | Callable[[torch.Tensor], torch.Tensor] = "elu_plus_one",
    causal: bool = False,
    state: tuple[torch.Tensor, torch.Tensor] | None = None,
    return_state: bool = False,
    implementation: str = "auto",
) -> Any:
    r"""Attention by a product of features instead of a softmax, in time linear in the length.

    .. math:: o_i = \frac{\phi(q_i)^\top S_i}{\phi(q_i)^\top z_i}, \qquad
        S_i = S_0 + \sum_j \phi(k_j) v_j^\top, \quad z_i = z_0 + \sum_j \phi(k_j)

    over all keys, or with `causal` over the keys up to i.

    Args:
        q: [B, H, T, D], float32, float64, bfloat16 or float16.
        k: [B, Hkv, S, D] of q's type; Hkv divides H, and H / Hkv query heads in a row share a head.
        v: [B, Hkv, S, Dv] of q's type.
        feature_map: "elu_plus_one", which is elu(x) + 1, "relu" or "identity"; or a function that
            is called with q and with k, may change their width, and is differentiated by autograd.
        causal: query i sees no key beyond i; T and S must be equal.
        state: (kv [B, Hkv, D, Dv], z [B, Hkv, D]), S_0 and z_0, what earlier keys summed to, in
            float32 (float64 for float64); both have gradients. None for zeros.
        return_state: also return the state after all keys, with which the next piece of the
            sequence goes on; T = 1 is a step of decoding.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [B, H, T, Dv], contiguous, of q's type; with return_state (out, (kv, z)), the state typed
        and shaped as `state`. Where a denominator is exactly 0, the row is 0, and so its gradients.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, T other than S with `causal`, an
            unknown feature_map.

    Numerical error: features, products and sums in float32 (float64 for float64), and on a GPU
        products that only reach 16-bit results in TF32. A map with negative values ("identity" of
        inputs that have some) can bring a denominator near 0, which multiplies all errors. A key or
        value that is not finite reaches the rows that see it; on a GPU with `causal` also the rows
        before it in its block of 64.

    Source: section 12.9; Katharopoulos et al., 2020, "Transformers are RNNs".
    """
    if torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
        q, k, v = _autocast(q, k, v)
    if callable(feature_map):
        q, k, feature_map = feature_map(q), feature_map(k), "identity"
    check(q, k, v, feature_map, causal, state)
    kv, z = (None, None) if state is None else state
    takes = k.numel() != 0 and v.numel() != 0 and (q.is_cpu or torch.version.hip is None)
    if not (implementation in ("auto", "kernel") and takes and kernel_ready(q, k, v, kv, z)):
        reasons = kernel_reasons(q, k, v, kv, z)
        if k.numel() == 0 or v.numel() == 0:
            reasons.append("the keys or values have no elements")
        if q.is_cuda and torch.version.hip is not None:
            reasons.append("no launch tables for AMD GPUs")
        choice = choose(
            OP,
            implementation,
            reasons,
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(q, k, v),
        )
        if choice == "reference":
            return reference.linear_attention(
                q, k, v, feature_map=feature_map, causal=causal, state=state,
                return_state=return_state,
            )  # fmt: skip
    found = _attend(q, k, v, kv, z, FEATURE_MAPS[feature_map], causal, return_state)
    return (found[0], (found[1], found[2])) if return_state else found


def _attend(
    q: Any, k: Any, v: Any, kv: Any, z: Any, feature_map: int, causal: bool, with_state: bool
) -> Any:
    """The kernels, on arguments that fit: out, or (out, kv, z)."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if kv is not None:
        kv, z = kv.contiguous(), z.contiguous()
    if needs_grad(q, k, v, kv, z):
        return _LinearAttention.apply(q, k, v, kv, z, feature_map, causal, with_state)
    found = FWD(q, k, v, kv, z, feature_map, causal)
    return found if with_state else found[0]


def _wide(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fake_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
    batch, heads, _, width = k.shape
    return (
        q.new_empty((*q.shape[:3], v.shape[3])),
        q.new_empty((batch, heads, width, v.shape[3]), dtype=_wide(q)),
        q.new_empty((batch, heads, width), dtype=_wide(q)),
    )


def _fake_bwd(
    dout: Any, dkv_out: Any, dz_out: Any, q: Any, k: Any, v: Any, kv: Any, z: Any,
    feature_map: int, causal: bool, need_dq: bool, need_dkv: bool, need_dstate: bool,
) -> Any:  # fmt: skip
    def result(shape: Any, wanted: bool, dtype: torch.dtype) -> torch.Tensor:
        return q.new_empty(shape, dtype=dtype) if wanted else q.new_empty(0, dtype=torch.float32)

    state = (*k.shape[:2], k.shape[3], v.shape[3])
    return (
        result(q.shape, need_dq, q.dtype),
        result(k.shape, need_dkv, q.dtype),
        result(v.shape, need_dkv, q.dtype),
        result(state, need_dstate, _wide(q)),
        result(state[:3], need_dstate, _wide(q)),
    )


FWD = _library.define(
    "linear_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? kv, Tensor? z, int feature_map,"
    " bool causal) -> (Tensor out, Tensor kv_out, Tensor z_out)",
    _fake_fwd,
)
# kv and z: what the queries start from, with a causal mask the state before all keys, else after.
BWD = _library.define(
    "linear_attention_bwd(Tensor dout, Tensor? dkv_out, Tensor? dz_out, Tensor q, Tensor k,"
    " Tensor v, Tensor? kv, Tensor? z, int feature_map, bool causal, bool need_dq, bool need_dkv,"
    " bool need_dstate) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dkv, Tensor dz)",
    _fake_bwd,
)
_library.launchers(
    "udlkernels.attention.linear_attention.kernels", "linear_attention_fwd", "linear_attention_bwd"
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, kv: Any, z: Any, feature_map: int, causal: bool,
        with_state: bool,
    ) -> Any:  # fmt: skip
        out, kv_out, z_out = FWD(q, k, v, kv, z, feature_map, causal)
        after = (None, None) if causal else (kv_out, z_out)
        ctx.save_for_backward(q, k, v, kv, z, *after)
        ctx.args = feature_map, causal
        ctx.set_materialize_grads(False)
        return (out, kv_out, z_out) if with_state else out

    @staticmethod
    def backward(ctx: Any, dout: Any, dkv_out: Any = None, dz_out: Any = None) -> Any:
        q, k, v, kv, z, kv_after, z_after = ctx.saved_tensors
        feature_map, causal = ctx.args
        wanted = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            grads = dout, dkv_out, dz_out
            formula = _formula(feature_map, causal)
            found = _dispatch.differentiate(formula, (q, k, v, kv, z), wanted, grads)
            return *found, None, None, None
        if dout is None:
            dout = q.new_zeros((*q.shape[:3], v.shape[3]))
        elif dout.stride(3) != 1:
            dout = dout.contiguous()
        if dkv_out is not None or dz_out is not None:
            wide = _wide(q)
            state = (*k.shape[:2], k.shape[3], v.shape[3])
            dkv_out = q.new_zeros(state, dtype=wide) if dkv_out is None else dkv_out.contiguous()
            dz_out = q.new_zeros(state[:3], dtype=wide) if dz_out is None else dz_out.contiguous()
        need_dq, need_dk, need_dv, need_kv, need_z = wanted
        start = (kv, z) if causal else (kv_after, z_after)
        dq, dk, dv, dkv, dz = BWD(
            dout, dkv_out, dz_out, q, k, v, *start, feature_map, causal,
            need_dq, need_dk or need_dv, need_kv or need_z,
        )  # fmt: skip
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            dkv if need_kv else None,
            dz if need_z else None,
            *(None,) * 3,
        )


def _formula(feature_map: int, causal: bool) -> Callable[..., Any]:
    """(out, kv, z) as the kernels give them, of (q, k, v, kv, z)."""
    (name,) = (name for name, number in FEATURE_MAPS.items() if number == feature_map)

    def formula(q: Any, k: Any, v: Any, kv: Any, z: Any) -> Any:
        out, state = reference.linear_attention(
            q, k, v, feature_map=name, causal=causal, state=None if kv is None else (kv, z),
            return_state=True,
        )  # fmt: skip
        return out, *state

    return formula
