"""layer_norm and add_layer_norm: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._philox import draw_seed, dropout
from udlkernels.normalization import _rows
from udlkernels.normalization.layer_norm import reference


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Layer normalization over the last dimensions.

    .. math:: y = \frac{x - \bar{x}}{\sqrt{\frac{1}{N} \sum_i (x_i - \bar{x})^2 + \epsilon}} w + b

    Args:
        input: [..., *normalized_shape]; float32, float64, bfloat16 or float16 for the kernels, and
            whatever else PyTorch's op takes.
        normalized_shape: the last dimensions, N elements in all.
        weight: [*normalized_shape] or None for ones; may be wider than the input's type.
        bias: [*normalized_shape] or None for zeros.
        eps: added to the variance.
        implementation: "auto", "kernel", "torch" or "reference".

    Returns:
        [..., *normalized_shape], contiguous, of the input's type.

    Raises:
        ArgumentError: an unknown `implementation`, or one that cannot serve.
        RuntimeError, NotImplementedError, TypeError: as torch.nn.functional.layer_norm.

    Numerical error: two passes (mean, then squares around it) in float32, or float64 for
    float64: no cancellation, however large the mean. A row whose squares overflow although its
    values are finite is redone scaled by its largest value.

    Source: section 11.4 and 12.4; Ba, Kiros and Hinton, 2016, "Layer Normalization".
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input, weight, bias)
        and _rows.shapes_fit(input, normalized_shape, weight, bias)
    ):
        shapes = _rows.shape_reasons(input, normalized_shape, weight=weight, bias=bias)
        choice = choose(
            "layer_norm",
            implementation,
            kernel_reasons(input, weight, bias) + shapes,
            inputs=describe(input, weight, bias),
        )
        if choice == "torch":
            return F.layer_norm(input, normalized_shape, weight, bias, eps)
        if choice == "reference":
            return reference.layer_norm(input, normalized_shape, weight, bias, eps)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()
    n = _rows.width(normalized_shape)
    if needs_grad(input, weight, bias):
        return _LayerNorm.apply(input, weight, bias, n, eps)
    return _FWD(input, weight, bias, n, eps)[0]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Residual addition, with dropout, and layer_norm of the sum, in one pass over memory.

    .. math:: s = \text{residual} + \text{dropout}(x), \qquad y = \text{layer\_norm}(s)

    Args:
        x: [..., *normalized_shape], float32, float64, bfloat16 or float16.
        residual: as x.
        normalized_shape, weight, bias, eps: as `layer_norm`.
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

    Numerical error: as layer_norm.

    Source: the transformer layer of section 12.4.
    """
    params = {"weight": weight, "bias": bias}
    _rows.check_add_norm(
        "add_layer_norm", x, residual, normalized_shape, eps, dropout_p, seed, **params
    )
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(x)
    if not (implementation in ("auto", "kernel") and kernel_ready(x, residual, weight, bias)):
        choice = choose(
            "add_layer_norm",
            implementation,
            kernel_reasons(x, residual, weight, bias),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(x, residual, weight, bias),
        )
        if choice == "reference":
            return reference.add_layer_norm(
                x, residual, normalized_shape, weight, bias, eps, dropout_p, seed
            )
    n = _rows.width(normalized_shape)
    args = n, eps, dropout_p, seed if dropout_p > 0.0 else None
    if needs_grad(x, residual, weight, bias):
        return _AddLayerNorm.apply(x, residual, weight, bias, *args)
    y, s, _ = _ADD_FWD(x, residual, weight, bias, *args)
    return y, s


def _stats_like(x: torch.Tensor, n: int) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((2, x.numel() // n), dtype=dtype)


def _if(wanted: bool, like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return like.new_empty(like.shape) if wanted else x.new_empty((0,), dtype=torch.float32)


def _fake_fwd(x: torch.Tensor, weight: Any, bias: Any, n: int, eps: Any) -> Any:
    return x.new_empty(x.shape), _stats_like(x, n)


def _fake_bwd(
    dy: Any, x: Any, weight: Any, bias: Any, stats: Any, n: Any, dx: bool, dw: bool, db: bool
) -> Any:
    return _if(dx, x, x), _if(dw, weight, x), _if(db, bias, x)


def _fake_add_fwd(x: torch.Tensor, residual: Any, weight: Any, bias: Any, n: int, *_: Any) -> Any:
    return x.new_empty(x.shape), x.new_empty(x.shape), _stats_like(x, n)


def _fake_add_bwd(dy: Any, ds: Any, s: Any, weight: Any, bias: Any, *args: Any) -> Any:
    *_, seed, dw, db = args
    return s.new_empty(s.shape), _if(seed is not None, s, s), _if(dw, weight, s), _if(db, bias, s)


_FWD = _library.define(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, int n, float eps)"
    " -> (Tensor y, Tensor stats)",
    _fake_fwd,
)
_BWD = _library.define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, int n,"
    " bool need_dx, bool need_dweight, bool need_dbias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fake_bwd,
)
_ADD_FWD = _library.define(
    "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, int n, float eps,"
    " float dropout_p, Tensor? seed) -> (Tensor y, Tensor s, Tensor stats)",
    _fake_add_fwd,
)
_ADD_BWD = _library.define(
    "add_layer_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor? bias,"
    " Tensor stats, int n, float dropout_p, Tensor? seed, bool need_dweight, bool need_dbias)"
    " -> (Tensor d_s, Tensor d_x, Tensor dweight, Tensor dbias)",
    _fake_add_bwd,
)
_library.launchers(
    "udlkernels.normalization.layer_norm.kernels",
    "layer_norm_fwd",
    "layer_norm_bwd",
    "add_layer_norm_fwd",
    "add_layer_norm_bwd",
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, n: int, eps: float) -> Any:
        y, stats = _FWD(x, weight, bias, n, eps)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.args = n, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        x, weight, bias, stats = ctx.saved_tensors
        n, eps = ctx.args
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, dweight, dbias = _dispatch.differentiate(
                _row_formula(n, eps), (x, weight, bias), (need_dx, need_dweight, need_dbias), (dy,)
            )
        else:
            dx, dweight, dbias = _BWD(
                dy, x, weight, bias, stats, n, need_dx, need_dweight, need_dbias
            )
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
            None,
        )


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, *args: Any) -> Any:
        n, eps, dropout_p, seed = args
        y, s, stats = _ADD_FWD(x, residual, weight, bias, *args)
        ctx.save_for_backward(s, weight, bias, stats, seed)
        ctx.args = n, eps, dropout_p
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx: Any, dy: Any, ds: Any) -> Any:
        s, weight, bias, stats, seed = ctx.saved_tensors
        n, eps, dropout_p = ctx.args
        need_dweight, need_dbias = ctx.needs_input_grad[2:4]
        dweight = dbias = None
        if dy is None:
            d_s, d_x = ds, None if ds is None else dropout(ds, dropout_p, seed, n)
        elif torch.is_grad_enabled():
            wanted = True, need_dweight, need_dbias
            d_s, dweight, dbias = _dispatch.differentiate(
                _row_formula(n, eps), (s, weight, bias), wanted, (dy,)
            )
            d_s = d_s if ds is None else d_s + ds
            d_x = None if d_s is None else dropout(d_s, dropout_p, seed, n)
        else:
            d_s, d_x, dweight, dbias = _ADD_BWD(
                dy, ds, s, weight, bias, stats, n, dropout_p, seed, need_dweight, need_dbias
            )
            d_x = d_s if seed is None else d_x
        dweight = dweight if need_dweight else None
        return d_x, d_s, dweight, dbias if need_dbias else None, None, None, None, None


def _row_formula(n: int, eps: float) -> Callable[..., torch.Tensor]:
    """The formula on rows of n elements, for a second differentiation."""

    def formula(x: torch.Tensor, *params: torch.Tensor | None) -> torch.Tensor:
        weight, bias = (None if p is None else p.reshape(n) for p in params)
        return reference.layer_norm(x.reshape(-1, n), (n,), weight, bias, eps).reshape(x.shape)

    return formula
