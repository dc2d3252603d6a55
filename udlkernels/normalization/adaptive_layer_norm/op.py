"""adaptive_layer_norm: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.normalization import _rows
from udlkernels.normalization.adaptive_layer_norm import reference


def adaptive_layer_norm(
    input: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Layer normalization over the last dimension, modulated for each sample, in one pass.

    .. math:: y_b = \text{layer\_norm}(x_b) \, (1 + \text{scale}_b) + \text{shift}_b

    Args:
        input: [B, ..., N], float32, float64, bfloat16 or float16.
        scale: [B, N]; may be wider than the input's type.
        shift: [B, N].
        eps: added to the variance.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [B, ..., N], contiguous, of the input's type.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, eps below 0 or not finite.

    Numerical error: as layer_norm; the modulation is computed in float32 (float64 for float64).

    Source: Peebles and Xie, 2023, "Scalable Diffusion Models with Transformers" (chapter 18).
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input, scale, shift)
        and input.dim() >= 2
        and scale.shape == shift.shape == (input.shape[0], input.shape[-1])
        and 0.0 <= eps < float("inf")
    ):
        _check(input, scale, shift, eps)
        choice = choose(
            "adaptive_layer_norm",
            implementation,
            kernel_reasons(input, scale, shift),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(input, scale, shift),
        )
        if choice == "reference":
            return reference.adaptive_layer_norm(input, scale, shift, eps)
    if needs_grad(input, scale, shift):
        return _AdaptiveLayerNorm.apply(input, scale, shift, eps)
    return _FWD(input, scale, shift, eps)[0]


def _check(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> None:
    op = "adaptive_layer_norm"
    if not x.dtype.is_floating_point or x.dim() < 2:
        raise ArgumentError(op, "input", "a floating point tensor [B, ..., N]", describe(x))
    expected = (x.shape[0], x.shape[-1])
    for name, tensor in (("scale", scale), ("shift", shift)):
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != expected:
            got = describe(tensor) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ArgumentError(op, name, f"shape {list(expected)} (the input's [B, N])", got)
        if not tensor.dtype.is_floating_point:
            raise ArgumentError(op, name, "a floating point tensor", tensor.dtype)
        if tensor.device != x.device:
            raise ArgumentError(op, name, f"a tensor on {x.device} (input's)", tensor.device)
    _rows.check_eps(op, eps)


def _fake_fwd(x: torch.Tensor, scale: Any, shift: Any, eps: float) -> tuple[torch.Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = x.new_empty((2, x.numel() // x.shape[-1]), dtype=dtype)
    return x.new_empty(x.shape), stats


def _fake_bwd(
    dy: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, stats: Any, *wanted: bool
) -> tuple[torch.Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if want else x.new_empty((0,), dtype=torch.float32)
        for t, want in zip((x, scale, shift), wanted, strict=True)
    )


_FWD = _library.define(
    "adaptive_layer_norm_fwd(Tensor x, Tensor scale, Tensor shift, float eps)"
    " -> (Tensor y, Tensor stats)",
    _fake_fwd,
)
_BWD = _library.define(
    "adaptive_layer_norm_bwd(Tensor dy, Tensor x, Tensor scale, Tensor shift, Tensor stats,"
    " bool need_dx, bool need_dscale, bool need_dshift)"
    " -> (Tensor dx, Tensor dscale, Tensor dshift)",
    _fake_bwd,
)
_library.launchers(
    "udlkernels.normalization.adaptive_layer_norm.kernels",
    "adaptive_layer_norm_fwd",
    "adaptive_layer_norm_bwd",
)


class _AdaptiveLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, scale: Any, shift: Any, eps: float) -> Any:
        y, stats = _FWD(x, scale, shift, eps)
        ctx.save_for_backward(x, scale, shift, stats)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        x, scale, shift, stats = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            eps = ctx.eps
            found = _dispatch.differentiate(
                lambda *t: reference.adaptive_layer_norm(t[0], t[1], t[2], eps),
                (x, scale, shift),
                wanted,
                (dy,),
            )
        else:
            found = _BWD(dy, x, scale, shift, stats, *wanted)
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), None
