"""rms_norm and add_rms_norm: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels._philox import draw_seed, dropout
from udlkernels.normalization import _rows
from udlkernels.normalization.rms_norm import reference

_CASTS = ("end", "before_weight")


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    cast: str = "end",
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Root mean square normalization over the last dimensions.

    .. math:: y = \frac{x}{\sqrt{\frac{1}{N} \sum_i x_i^2 + \epsilon}} \, (w + \text{offset})

    Args:
        input: [..., *normalized_shape]; float32, float64, bfloat16 or float16 for the kernels, and
            whatever else PyTorch's op takes.
        normalized_shape: the last dimensions, N elements in all.
        weight: [*normalized_shape] or None for ones; may be wider than the input's type.
        eps: added to the mean square; None takes the machine epsilon of the type computed in
            (float32's for 16-bit inputs).
        weight_offset: added to the weight; 1.0 is Gemma's form.
        cast: "end" rounds once, after the weight; "before_weight" rounds the normalised value to
            the input's type before the product, as Llama does.
        implementation: "auto", "kernel", "torch" or "reference".

    Returns:
        [..., *normalized_shape], contiguous, of the input's type.

    Raises:
        ArgumentError: unknown `cast` or `implementation`, or an implementation that cannot serve.
        RuntimeError, NotImplementedError, TypeError: as torch.nn.functional.rms_norm.

    Numerical error: computed in float32 (float64 for float64). A row whose squares overflow
    although its values are finite is redone scaled by its largest value.

    Source: Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization".
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input, weight)
        and _rows.shapes_fit(input, normalized_shape, weight)
        and cast in _CASTS
    ):
        if cast not in _CASTS:
            raise ArgumentError("rms_norm", "cast", f"one of {_CASTS}", repr(cast))
        plain = weight is None or (weight_offset == 0.0 and cast == "end")
        shapes = _rows.shape_reasons(input, normalized_shape, weight=weight)
        choice = choose(
            "rms_norm",
            implementation,
            kernel_reasons(input, weight) + shapes,
            torch_reasons=() if plain else ("PyTorch has no weight_offset and no cast",),
            inputs=describe(input, weight),
        )
        if choice == "torch":
            return F.rms_norm(input, normalized_shape, weight, eps)
        if choice == "reference":
            return reference.rms_norm(input, normalized_shape, weight, eps, weight_offset, cast)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()
    n = _rows.width(normalized_shape)
    eps = _eps(input, eps)
    before = cast == "before_weight"
    if needs_grad(input, weight):
        return _RMSNorm.apply(input, weight, n, eps, weight_offset, before)
    return _FWD(input, weight, n, eps, weight_offset, before)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    *,
    eps: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    cast: str = "end",
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Residual addition, with dropout, and rms_norm of the sum, in one pass over memory.

    .. math:: s = \text{residual} + \text{dropout}(x), \qquad y = \text{rms\_norm}(s)

    Args:
        x: [..., *normalized_shape], float32, float64, bfloat16 or float16.
        residual: as x.
        normalized_shape, weight, eps, weight_offset, cast: as `rms_norm`.
        dropout_p: probability with which an element of x is dropped. Callers pass 0 in evaluation.
        seed: int64, one value, on x's device; None draws one from torch's generator. The mask is a
            function of the seed and an element's place alone, not PyTorch's mask.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        y and s, both [..., *normalized_shape], contiguous, of x's type; s is rounded to that type
        before it is normalised.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, eps below 0 or not finite,
            dropout_p outside [0, 1], a seed that is not one int64.

    Numerical error: as rms_norm.

    Source: the residual pattern of section 11.2 and of every transformer layer (section 12.4).
    """
    if cast not in _CASTS:
        raise ArgumentError("add_rms_norm", "cast", f"one of {_CASTS}", repr(cast))
    _rows.check_add_norm(
        "add_rms_norm", x, residual, normalized_shape, eps, dropout_p, seed, weight=weight
    )
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(x)
    before = cast == "before_weight"
    if not (implementation in ("auto", "kernel") and kernel_ready(x, residual, weight)):
        choice = choose(
            "add_rms_norm",
            implementation,
            kernel_reasons(x, residual, weight),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(x, residual, weight),
        )
        if choice == "reference":
            return reference.add_rms_norm(
                x, residual, normalized_shape, weight, eps, dropout_p, seed, weight_offset, cast
            )
    n = _rows.width(normalized_shape)
    args = (n, _eps(x, eps), weight_offset, before, dropout_p, seed if dropout_p > 0.0 else None)
    if needs_grad(x, residual, weight):
        return _AddRMSNorm.apply(x, residual, weight, *args)
    y, s, _ = _ADD_FWD(x, residual, weight, *args)
    return y, s


def _eps(x: torch.Tensor, eps: float | None) -> float:
    if eps is None:
        return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    return eps


def _stats_like(x: torch.Tensor, n: int) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.numel() // n,), dtype=dtype)


def _none_like(x: torch.Tensor) -> torch.Tensor:
    """What an op returns for a gradient nobody asked for."""
    return x.new_empty((0,), dtype=torch.float32)


def _fake_fwd(x: torch.Tensor, weight: Any, n: int, *_: Any) -> tuple[torch.Tensor, ...]:
    return x.new_empty(x.shape), _stats_like(x, n)


def _fake_bwd(
    dy: Any, x: torch.Tensor, weight: Any, rstd: Any, n: Any, offset: Any, need_dx: bool,
    need_dw: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return (
        x.new_empty(x.shape) if need_dx else _none_like(x),
        weight.new_empty(weight.shape) if need_dw else _none_like(x),
    )


def _fake_add_fwd(
    x: torch.Tensor, residual: Any, weight: Any, n: int, *_: Any
) -> tuple[torch.Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _stats_like(x, n)


def _fake_add_bwd(
    dy: Any, ds: Any, s: torch.Tensor, weight: Any, rstd: Any, n: Any, offset: Any,
    dropout_p: float, seed: Any, need_dw: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return (
        s.new_empty(s.shape),
        s.new_empty(s.shape) if seed is not None else _none_like(s),
        weight.new_empty(weight.shape) if need_dw else _none_like(s),
    )


_FWD = _library.define(
    "rms_norm_fwd(Tensor x, Tensor? weight, int n, float eps, float weight_offset,"
    " bool cast_before_weight) -> (Tensor y, Tensor rstd)",
    _fake_fwd,
)
_BWD = _library.define(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, int n, float weight_offset,"
    " bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)",
    _fake_bwd,
)
_ADD_FWD = _library.define(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, int n, float eps,"
    " float weight_offset, bool cast_before_weight, float dropout_p, Tensor? seed)"
    " -> (Tensor y, Tensor s, Tensor rstd)",
    _fake_add_fwd,
)
_ADD_BWD = _library.define(
    "add_rms_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor rstd, int n,"
    " float weight_offset, float dropout_p, Tensor? seed, bool need_dweight)"
    " -> (Tensor d_s, Tensor d_x, Tensor dweight)",
    _fake_add_bwd,
)
_library.launchers(
    "udlkernels.normalization.rms_norm.kernels",
    "rms_norm_fwd",
    "rms_norm_bwd",
    "add_rms_norm_fwd",
    "add_rms_norm_bwd",
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, *args: Any) -> Any:
        y, rstd = _FWD(x, weight, *args)
        ctx.save_for_backward(x, weight, rstd)
        ctx.args = args
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        x, weight, rstd = ctx.saved_tensors
        n, eps, offset, before = ctx.args
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            formula = _row_formula(n, eps, offset, before)
            wanted = need_dx, need_dweight
            dx, dweight = _dispatch.differentiate(formula, (x, weight), wanted, (dy,))
            return dx, dweight, None, None, None, None
        dx, dweight = _BWD(dy, x, weight, rstd, n, offset, need_dx, need_dweight)
        return dx if need_dx else None, dweight if need_dweight else None, None, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, *args: Any) -> Any:
        n, eps, offset, before, dropout_p, seed = args
        y, s, rstd = _ADD_FWD(x, residual, weight, *args)
        ctx.save_for_backward(s, weight, rstd, seed)
        ctx.args = n, eps, offset, before, dropout_p
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx: Any, dy: Any, ds: Any) -> Any:
        s, weight, rstd, seed = ctx.saved_tensors
        n, eps, offset, before, dropout_p = ctx.args
        need_dweight = ctx.needs_input_grad[2]
        if dy is None:
            d_s, dweight = ds, None
            d_x = None if ds is None else dropout(ds, dropout_p, seed, n)
        elif torch.is_grad_enabled():
            formula = _row_formula(n, eps, offset, before)
            wanted = True, need_dweight
            d_s, dweight = _dispatch.differentiate(formula, (s, weight), wanted, (dy,))
            d_s = d_s if ds is None else d_s + ds
            d_x = None if d_s is None else dropout(d_s, dropout_p, seed, n)
        else:
            d_s, d_x, dweight = _ADD_BWD(
                dy, ds, s, weight, rstd, n, offset, dropout_p, seed, need_dweight
            )
            d_x = d_s if seed is None else d_x
        return d_x, d_s, dweight if need_dweight else None, *(None,) * 6


def _row_formula(n: int, eps: float, offset: float, before: bool) -> Callable[..., torch.Tensor]:
    """The formula on rows of n elements, for a second differentiation."""
    cast = _CASTS[before]

    def formula(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        flat = None if weight is None else weight.reshape(n)
        return reference.rms_norm(x.reshape(-1, n), (n,), flat, eps, offset, cast).reshape(x.shape)

    return formula
