"""act_norm: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.normalization._channels import empty_channels
from udlkernels.normalization.act_norm import reference


def act_norm(
    input: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Activation normalization: an invertible affine map of each channel, and its log-determinant.

    .. math:: y_{bcp} = (x_{bcp} + b_c) \, e^{s_c}, \qquad
        \log |\det J_b| = P \sum_c s_c

    Args:
        input: [B, C, ...] with P positions a channel; float32, float64, bfloat16 or float16.
        log_scale: [C]; may be wider than the input's type.
        bias: [C].
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        y: [B, C, ...] of the input's type, channels-last where the input is, otherwise contiguous.
        logdet: [B], float32 (float64 for float64), the same for every sample.

    Raises:
        ArgumentError: shapes, types or devices that do not fit.

    Numerical error: one rounding to the input's type; gradients of the parameters are summed in
    float32 over fixed chunks, and those in float64.

    Source: Kingma and Dhariwal, 2018, "Glow" (section 16.3.1).
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input, log_scale, bias)
        and input.dim() >= 2
        and log_scale.shape == bias.shape == (input.shape[1],)
    ):
        _check(input, log_scale, bias)
        choice = choose(
            "act_norm",
            implementation,
            kernel_reasons(input, log_scale, bias),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(input, log_scale, bias),
        )
        if choice == "reference":
            return reference.act_norm(input, log_scale, bias)
    if needs_grad(input, log_scale, bias):
        return _ActNorm.apply(input, log_scale, bias)
    return _FWD(input, log_scale, bias)


def _check(x: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor) -> None:
    if not x.dtype.is_floating_point or x.dim() < 2:
        raise ArgumentError("act_norm", "input", "a floating point tensor [B, C, ...]", describe(x))
    for name, tensor in (("log_scale", log_scale), ("bias", bias)):
        expected = f"a floating point tensor [{x.shape[1]}] (the input's channels) on {x.device}"
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError("act_norm", name, expected, type(tensor).__name__)
        fits = tuple(tensor.shape) == (x.shape[1],) and tensor.device == x.device
        if not (fits and tensor.dtype.is_floating_point):
            raise ArgumentError("act_norm", name, expected, describe(tensor))


def _fake_fwd(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return empty_channels(x), x.new_empty((x.shape[0],), dtype=dtype)


def _fake_bwd(
    dy: Any, dlogdet: Any, x: torch.Tensor, log_scale: Any, bias: Any, need_dx: bool
) -> tuple[torch.Tensor, ...]:
    dx = empty_channels(x) if need_dx else x.new_empty((0,), dtype=torch.float32)
    return dx, log_scale.new_empty(log_scale.shape), bias.new_empty(bias.shape)


_FWD = _library.define(
    "act_norm_fwd(Tensor x, Tensor log_scale, Tensor bias) -> (Tensor y, Tensor logdet)", _fake_fwd
)
_BWD = _library.define(
    "act_norm_bwd(Tensor dy, Tensor dlogdet, Tensor x, Tensor log_scale, Tensor bias, bool need_dx)"
    " -> (Tensor dx, Tensor dlog_scale, Tensor dbias)",
    _fake_bwd,
)
_library.launchers("udlkernels.normalization.act_norm.kernels", "act_norm_fwd", "act_norm_bwd")


class _ActNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, log_scale: Any, bias: Any) -> Any:
        ctx.save_for_backward(x, log_scale, bias)
        return _FWD(x, log_scale, bias)

    @staticmethod
    def backward(ctx: Any, dy: Any, dlogdet: Any) -> Any:
        wanted = ctx.needs_input_grad
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(_dispatch.differentiate(reference.act_norm, inputs, wanted, (dy, dlogdet)))
        found = _BWD(dy, dlogdet, *inputs, wanted[0])
        return tuple(g if want else None for g, want in zip(found, wanted, strict=True))
