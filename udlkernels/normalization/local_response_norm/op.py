"""local_response_norm: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels.normalization._channels import empty_channels
from udlkernels.normalization.local_response_norm import reference


def local_response_norm(
    input: torch.Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Local response normalization: each channel is divided by its neighbours' energy.

    .. math:: y_c = x_c \left(k + \frac{\alpha}{n} \sum_{c'} x_{c'}^2 \right)^{-\beta}, \qquad
        c - \lfloor n / 2 \rfloor \le c' \le c + \lfloor (n - 1) / 2 \rfloor

    Args:
        input: [B, C, ...] of three or more dimensions; float32, float64, bfloat16 or float16 for
            the kernels (PyTorch has no 16-bit form on the CPU), and whatever else PyTorch's takes.
        size: n, the channels in a window; those outside the tensor count as zeros.
        alpha: factor of the mean square.
        beta: exponent. 0.5, 0.75 and 1 are computed from square roots and the fastest.
        k: added to the mean square.
        implementation: "auto", "kernel", "torch" or "reference".

    Returns:
        [B, C, ...] of the input's type, channels-last where the input is, otherwise contiguous.

    Raises:
        ArgumentError: an unknown `implementation`, or one that cannot serve.
        ValueError, RuntimeError, TypeError: as torch.nn.functional.local_response_norm.

    Numerical error: every window is summed from its own elements in float32 (float64 for float64),
    never as a difference. Windows near the limits of float32 are redone in float64.

    Source: Krizhevsky, Sutskever and Hinton, 2012, the network of section 10.5.1.
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input)
        and input.dim() >= 3
        and _is_plain(size, alpha, beta, k)
    ):
        reasons = kernel_reasons(input)
        if input.dim() < 3:
            reasons.append("the input has fewer than three dimensions")
        if not _is_plain(size, alpha, beta, k):
            reasons.append("size is not a positive int, or alpha, beta or k not a number")
        narrow = input.is_cpu and input.dtype in (torch.bfloat16, torch.float16)
        valid = input.dim() >= 3 and input.numel() > 0 and _is_plain(size, alpha, beta, k)
        choice = choose(
            "local_response_norm",
            implementation,
            reasons,
            torch_reasons=(f"PyTorch has it not in {input.dtype} on the CPU",)
            if narrow and valid
            else (),
            inputs=describe(input),
        )
        if choice == "torch":
            return F.local_response_norm(input, size, alpha, beta, k)
        if choice == "reference":
            return reference.local_response_norm(input, size, alpha, beta, k)
    if needs_grad(input):
        return _LocalResponseNorm.apply(input, size, alpha, beta, k)
    return _FWD(input, size, alpha, beta, k)


def _is_plain(size: Any, *numbers: Any) -> bool:
    if not (isinstance(size, (int, torch.SymInt)) and size > 0):
        return False
    for number in numbers:
        if type(number) is not float and type(number) is not int:
            return False
    return True


def _fake_fwd(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return empty_channels(x)


def _fake_bwd(dy: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return empty_channels(x)


_FWD = _library.define(
    "local_response_norm_fwd(Tensor x, int size, float alpha, float beta, float k) -> Tensor",
    _fake_fwd,
)
_BWD = _library.define(
    "local_response_norm_bwd(Tensor dy, Tensor x, int size, float alpha, float beta, float k)"
    " -> Tensor",
    _fake_bwd,
)
_library.launchers(
    "udlkernels.normalization.local_response_norm.kernels",
    "local_response_norm_fwd",
    "local_response_norm_bwd",
)


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, *args: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.args = args
        return _FWD(x, *args)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            (dx,) = _dispatch.differentiate(
                lambda t: reference.local_response_norm(t, *ctx.args), (x,), (True,), (dy,)
            )
        else:
            dx = _BWD(dy, x, *ctx.args)
        return dx, None, None, None, None
