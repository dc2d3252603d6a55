"""spectral_norm: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons
from udlkernels._errors import ArgumentError
from udlkernels.normalization._rows import check_eps
from udlkernels.normalization.spectral_norm import reference


def spectral_norm(
    weight: torch.Tensor,
    u: torch.Tensor,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    training: bool = True,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Spectral normalization: a matrix divided by an estimate of its largest singular value.

    .. math:: v \leftarrow \frac{W^T u}{\lVert W^T u \rVert}, \quad
        u \leftarrow \frac{W v}{\lVert W v \rVert}, \quad \sigma = u^T W v, \quad
        y = \frac{W}{\sigma}

    Args:
        weight: [H, ...], a matrix of H rows once the other dimensions are flattened.
        u: [H], the estimate of the left singular vector so far; it is not written.
        n_power_iterations: iterations of a call in training.
        eps: the least norm to divide by.
        training: whether u is improved; otherwise only v and sigma are computed from it.
        implementation: "auto", "kernel" or "reference"; PyTorch has it only as a module.

    Returns:
        weight / sigma, [H, ...], contiguous, of weight's type; the new u, of u's type, and v, of
        weight's. Only the first has a gradient, in which u and v count as constants.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, no iterations in training, eps
            below 0 or not finite.

    Numerical error: products and norms in float32 (float64 for float64), u and v rounded once,
    after sigma is computed.

    Source: Miyato et al., 2018, "Spectral Normalization for Generative Adversarial Networks"
    (section 15.3).
    """
    _check(weight, u, n_power_iterations, eps)
    iterations = n_power_iterations if training else 0
    if not (implementation in ("auto", "kernel") and kernel_ready(weight, u)):
        choice = choose(
            "spectral_norm",
            implementation,
            kernel_reasons(weight, u),
            fallback="reference",
            torch_reasons=("PyTorch has no such function",),
            inputs=describe(weight, u),
        )
        if choice == "reference":
            return reference.spectral_norm(weight, u, iterations, eps)
    y, new_u, v = normalize(weight, u.detach(), None, iterations, eps)
    return y, new_u.to(u.dtype), v.to(weight.dtype)


def normalize(
    weight: torch.Tensor,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    iterations: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernels: weight / sigma, u and v (in float32 or float64) after the iterations.

    They start from u, or from v where there is no u; with both and no iterations only sigma is
    computed.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return _SpectralNorm.apply(weight, u, v, iterations, eps)
    return _FWD(weight, u, v, iterations, eps)[:3]


def _check(weight: torch.Tensor, u: torch.Tensor, iterations: int, eps: float) -> None:
    op = "spectral_norm"
    if not weight.dtype.is_floating_point or weight.dim() < 2:
        expected = "a floating point tensor of two or more dimensions"
        raise ArgumentError(op, "weight", expected, describe(weight))
    if u.shape != weight.shape[:1] or u.device != weight.device or not u.dtype.is_floating_point:
        expected = f"a floating point tensor [{weight.shape[0]}] on {weight.device}"
        raise ArgumentError(op, "u", expected, describe(u))
    if weight.numel() == 0:
        raise ArgumentError(op, "weight", "at least one element", describe(weight))
    if iterations < 1:
        raise ArgumentError(op, "n_power_iterations", "at least 1", iterations)
    check_eps(op, eps)


def _fake_fwd(weight: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = weight.shape[0]
    vectors = (rows,), (weight.numel() // rows,), (1,)
    return weight.new_empty(weight.shape), *(weight.new_empty(n, dtype=dtype) for n in vectors)


def _fake_bwd(dy: Any, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return weight.new_empty(weight.shape)


_FWD = _library.define(
    "spectral_norm_fwd(Tensor weight, Tensor? u, Tensor? v, int iterations, float eps)"
    " -> (Tensor y, Tensor new_u, Tensor new_v, Tensor sigma)",
    _fake_fwd,
)
_BWD = _library.define(
    "spectral_norm_bwd(Tensor dy, Tensor weight, Tensor u, Tensor v, Tensor sigma) -> Tensor",
    _fake_bwd,
)
_library.launchers(
    "udlkernels.normalization.spectral_norm.kernels", "spectral_norm_fwd", "spectral_norm_bwd"
)


class _SpectralNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, u: Any, v: Any, iterations: int, eps: float) -> Any:
        y, new_u, new_v, sigma = _FWD(weight, u, v, iterations, eps)
        ctx.save_for_backward(weight, new_u, new_v, sigma)
        ctx.mark_non_differentiable(new_u, new_v)
        return y, new_u, new_v

    @staticmethod
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        weight, u, v, sigma = ctx.saved_tensors
        if torch.is_grad_enabled():
            (dw,) = _dispatch.differentiate(
                lambda w: reference.scale(w, u, v), (weight,), (True,), (dy,)
            )
        else:
            dw = _BWD(dy, weight, u, v, sigma)
        return dw, None, None, None, None
