"""pixel_norm: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.normalization._channels import empty_channels, is_channels_last, positions_of
from udlkernels.normalization._rows import check_eps
from udlkernels.normalization.pixel_norm import reference


def pixel_norm(
    input: torch.Tensor, *, eps: float = 1e-8, implementation: str = "auto"
) -> torch.Tensor:
    r"""Root mean square normalization of each position's channels.

    .. math:: y_{bcp} = \frac{x_{bcp}}{\sqrt{\frac{1}{C} \sum_{c'} x_{bc'p}^2 + \epsilon}}

    Args:
        input: [B, C, ...], float32, float64, bfloat16 or float16.
        eps: added to the mean square.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [B, C, ...] of the input's type, channels-last where the input is, otherwise contiguous.

    Raises:
        ArgumentError: an input of fewer than two dimensions or no floating point type, eps below 0
            or not finite.

    Numerical error: computed in float32 (float64 for float64). Where squares of finite values
    overflow, a position is redone scaled by its largest value.

    Source: Karras et al., 2018, "Progressive Growing of GANs" (chapter 15).
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input)
        and input.dim() >= 2
        and 0.0 <= eps < float("inf")
    ):
        if not input.dtype.is_floating_point or input.dim() < 2:
            expected = "a floating point tensor [B, C, ...]"
            raise ArgumentError("pixel_norm", "input", expected, describe(input))
        check_eps("pixel_norm", eps)
        choice = choose(
            "pixel_norm",
            implementation,
            kernel_reasons(input),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(input),
        )
        if choice == "reference":
            return reference.pixel_norm(input, eps)
    if needs_grad(input):
        return _PixelNorm.apply(input, eps)
    return _FWD(input, eps)[0]


def _fake_fwd(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that are rows in memory keep their inverse root mean squares for the backward."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = positions_of(x)
    last = is_channels_last(x)
    rows = x.shape[0] * positions if last or positions == 1 else 0
    return empty_channels(x, last), x.new_empty((rows,), dtype=dtype)


def _fake_bwd(dy: torch.Tensor, x: torch.Tensor, rstd: Any, eps: float) -> torch.Tensor:
    return empty_channels(x)


_FWD = _library.define("pixel_norm_fwd(Tensor x, float eps) -> (Tensor y, Tensor rstd)", _fake_fwd)
_BWD = _library.define(
    "pixel_norm_bwd(Tensor dy, Tensor x, Tensor rstd, float eps) -> Tensor", _fake_bwd
)
_library.launchers(
    "udlkernels.normalization.pixel_norm.kernels", "pixel_norm_fwd", "pixel_norm_bwd"
)


class _PixelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, eps: float) -> Any:
        y, rstd = _FWD(x, eps)
        ctx.save_for_backward(x, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        x, rstd = ctx.saved_tensors
        eps = ctx.eps
        if torch.is_grad_enabled():
            (dx,) = _dispatch.differentiate(
                lambda t: reference.pixel_norm(t, eps), (x,), (True,), (dy,)
            )
        else:
            dx = _BWD(dy, x, rstd, eps)
        return dx, None
