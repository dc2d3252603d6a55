"""batch_norm and batch_norm_act: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.normalization._activation import ACTIVATIONS, activation_index
from udlkernels.normalization.batch_norm import reference

_HALVES = (torch.bfloat16, torch.float16)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Batch normalization: each channel is normalised over the batch and all positions.

    .. math:: y = \frac{x - \bar{x}_c}{\sqrt{\sigma_c^2 + \epsilon}} w_c + b_c

    Args:
        input: [N, C, *]; float32, float64, bfloat16 or float16 for the kernels.
        running_mean: [C] or None; in training it moves by `momentum` towards the batch's mean, in
            evaluation it takes its place.
        running_var: [C] or None; as running_mean, towards the batch's unbiased variance.
        weight: [C] or None for ones; of the input's type, or float32 beside a 16-bit input.
        bias: [C] or None for zeros.
        training: whether to use the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        implementation: "auto", "kernel", "torch" or "reference".

    Returns:
        [N, C, *] of the input's type; channels-last where the input is, else contiguous.

    Raises:
        ArgumentError: an unknown `implementation`, or one that cannot serve.
        ValueError, RuntimeError, NotImplementedError: as torch.nn.functional.batch_norm.

    Numerical error: two passes over chunks that are merged in float64; the mean is kept to more
    digits than the input's type, so that a mean of 100 with a deviation of 0.01 costs none. A
    channel whose squares overflow although its values are finite is redone scaled by its largest.

    Source: section 11.4; Ioffe and Szegedy, 2015, "Batch Normalization".
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input, running_mean, running_var, weight, bias)
        and _fits(input, running_mean, running_var, weight, bias, training, momentum, eps)
    ):
        tensors = input, running_mean, running_var, weight, bias
        choice = choose(
            "batch_norm",
            implementation,
            kernel_reasons(*tensors) + reasons_for(*tensors, training, momentum, eps),
            inputs=describe(*tensors),
        )
        if choice == "torch":
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        if choice == "reference":
            return reference.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
    return _kernel(
        input, running_mean, running_var, weight, bias, training, momentum, eps, 0, 0.0, None
    )


def batch_norm_act(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    residual: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Batch normalization, a residual sum and an activation in one pass over memory.

    .. math:: y = \text{act}(\text{batch\_norm}(x) + \text{residual})

    Args:
        input: [N, C, *], float32, float64, bfloat16 or float16.
        running_mean, running_var, weight, bias, training, momentum, eps: as `batch_norm`.
        activation: "identity", "relu", "leaky_relu", "gelu", "gelu_tanh" or "silu".
        negative_slope: leaky_relu's factor for negative values.
        residual: added before the activation; as input, or None.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [N, C, *] of the input's type; channels-last where the input is, else contiguous.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, an unknown activation, eps below 0
            or not finite (or 0 in training), one value per channel in training, evaluation without
            running statistics.

    Numerical error: as batch_norm; the activation is applied before the one rounding to the input's
    type. The backward keeps no pre-activation: it is found again from the input, or, for relu and
    leaky_relu with a residual, told by the sign of the output.

    Source: the residual block of section 11.4.
    """
    act = activation_index("batch_norm_act", activation)
    tensors = input, running_mean, running_var, weight, bias
    ready = implementation in ("auto", "kernel") and kernel_ready(*tensors, residual)
    if not (ready and _fits(*tensors, training, momentum, eps) and _fits_residual(input, residual)):
        _check_act(*tensors, training, momentum, eps, residual)
        choice = choose(
            "batch_norm_act",
            implementation,
            kernel_reasons(*tensors, residual) + reasons_for(*tensors, training, momentum, eps),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(*tensors, residual),
        )
        if choice == "reference":
            return reference.batch_norm_act(
                *tensors, training, momentum, eps, activation, negative_slope, residual
            )
    return _kernel(*tensors, training, momentum, eps, act, negative_slope, residual)


def _fits(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> bool:
    """The answer of `reasons_for` without the words."""
    if not 2 <= x.dim() <= 5 or (running_mean is None) != (running_var is None):
        return False
    shape, dtype = x.shape[1:2], x.dtype
    for param in (running_mean, running_var, weight, bias):
        if param is not None and not (
            param.shape == shape
            and (param.dtype is dtype or (dtype in _HALVES and param.dtype is torch.float32))
        ):
            return False
    if not training:
        return running_mean is not None and 0.0 <= eps < math.inf
    return (
        0.0 < eps < math.inf
        and x.numel() != shape[0]
        and momentum is not None
        and not (running_mean is not None and needs_grad(running_mean, running_var))
    )


def reasons_for(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> list[str]:
    """Why the kernels cannot take these arguments, in words."""
    if not 2 <= x.dim() <= 5:
        return [f"the input has {x.dim()} dimensions, not 2 to 5"]
    reasons = []
    for name, param in zip(
        ("running_mean", "running_var", "weight", "bias"),
        (running_mean, running_var, weight, bias),
        strict=True,
    ):
        if param is None:
            continue
        if param.shape != x.shape[1:2]:
            reasons.append(f"{name} has shape {list(param.shape)}, not [{x.shape[1]}]")
        if param.dtype != x.dtype and not (x.dtype in _HALVES and param.dtype == torch.float32):
            reasons.append(f"{name} of {param.dtype} beside an input of {x.dtype}")
        if training and name.startswith("running") and needs_grad(param):
            reasons.append(f"{name} requires a gradient")
    if (running_mean is None) != (running_var is None):
        reasons.append("one of the running statistics without the other")
    if not training and running_mean is None:
        reasons.append("evaluation without running statistics")
    if not (0.0 < eps < math.inf if training else 0.0 <= eps < math.inf):
        reasons.append(f"eps of {eps}")
    if training and x.numel() == x.shape[1]:
        reasons.append("one value per channel in training")
    if training and momentum is None:
        reasons.append("a momentum of None")
    return reasons


def _fits_residual(x: torch.Tensor, residual: torch.Tensor | None) -> bool:
    return residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)


def _check_act(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: torch.Tensor | None,
) -> None:
    """Raises for arguments that no implementation of batch_norm_act can take."""
    op = "batch_norm_act"
    if not x.dtype.is_floating_point:
        raise ArgumentError(op, "input", "a floating point tensor", x.dtype)
    if x.dim() < 2:
        raise ArgumentError(op, "input", "a tensor [N, C, *]", describe(x))
    params = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
        "residual": residual,
    }
    for name, tensor in params.items():
        if tensor is not None and tensor.device != x.device:
            raise ArgumentError(op, name, f"a tensor on {x.device} (input's device)", tensor.device)
    if not _fits_residual(x, residual):
        raise ArgumentError(op, "residual", f"{describe(x)} (as input)", describe(residual))
    values = x.numel() // x.shape[1] if x.shape[1] else 0
    if training and values == 1:
        raise ArgumentError(op, "input", "more than 1 value per channel in training", describe(x))
    if x.dim() <= 5:
        reasons = reasons_for(x, running_mean, running_var, weight, bias, training, momentum, eps)
        if reasons:
            raise ArgumentError(op, "arguments", "such as fit together", "; ".join(reasons))


def _kernel(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: int,
    slope: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    args = running_mean, running_var, training, momentum, eps, act, slope
    if needs_grad(x, residual, weight, bias):
        y, new_mean, new_var = _BatchNorm.apply(x, residual, weight, bias, *args)
    else:
        y, _, new_mean, new_var = FORWARD(x, residual, weight, bias, *args)
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return y


def _like(x: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """A result shaped like x, in the layout that PyTorch's op gives it."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x)) if wanted else _none(x)


def _none(x: torch.Tensor) -> torch.Tensor:
    """What an op returns for a result nobody asked for."""
    return x.new_empty((0,), dtype=torch.float32)


def _vector(like: torch.Tensor | None, wanted: bool, x: torch.Tensor) -> torch.Tensor:
    return like.new_empty(like.shape) if wanted and like is not None else _none(x)


def _fake_fwd(
    x: torch.Tensor, residual: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
    training: bool, *_: Any,
) -> Any:  # fmt: skip
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = x.new_empty((3, x.shape[1]), dtype=acc)
    news = (_vector(running, training, x) for running in (running_mean, running_var))
    return _like(x), stats, *news


def _fake_bwd(
    dy: Any, x: torch.Tensor, residual: Any, y: Any, weight: Any, bias: Any, stats: Any,
    training: Any, act: Any, slope: Any, dx: bool, dresidual: bool, dweight: bool, dbias: bool,
) -> Any:  # fmt: skip
    return _like(x, dx), _like(x, dresidual), _vector(weight, dweight, x), _vector(bias, dbias, x)


FORWARD = _library.define(
    "batch_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias,"
    " Tensor? running_mean, Tensor? running_var, bool training, float momentum, float eps,"
    " int activation, float negative_slope)"
    " -> (Tensor y, Tensor stats, Tensor new_mean, Tensor new_var)",
    _fake_fwd,
)
_BWD = _library.define(
    "batch_norm_bwd(Tensor dy, Tensor x, Tensor? residual, Tensor? y, Tensor? weight, Tensor? bias,"
    " Tensor stats, bool training, int activation, float negative_slope, bool need_dx,"
    " bool need_dresidual, bool need_dweight, bool need_dbias)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _fake_bwd,
)
# The steps between which sync_batch_norm exchanges what each process has found.
MOMENTS = _library.define(
    "batch_norm_moments(Tensor x) -> Tensor",
    lambda x: x.new_empty((2, x.shape[1]), dtype=torch.float64),
)
SUMS = _library.define(
    "batch_norm_sums(Tensor dy, Tensor x, Tensor stats) -> Tensor",
    lambda dy, x, stats: x.new_empty((2, x.shape[1]), dtype=torch.float64),
)
DX = _library.define(
    "batch_norm_dx(Tensor dy, Tensor x, Tensor? weight, Tensor stats, Tensor means) -> Tensor",
    lambda dy, x, weight, stats, means: _like(x),
)
_library.launchers(
    "udlkernels.normalization.batch_norm.kernels",
    "batch_norm_fwd",
    "batch_norm_bwd",
    "batch_norm_moments",
    "batch_norm_sums",
    "batch_norm_dx",
)
_IDENTITY, _RELU, _LEAKY_RELU = range(3)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, residual: Any, weight: Any, bias: Any, *args: Any) -> Any:
        y, stats, new_mean, new_var = FORWARD(x, residual, weight, bias, *args)
        _, _, training, _, eps, act, slope = args
        kept_residual = kept_y = None
        if residual is not None and act != _IDENTITY:
            # The output's sign tells the slope of these two; the others need their argument.
            if act == _RELU or (act == _LEAKY_RELU and slope >= 0.0):
                kept_y = y
            else:
                kept_residual = residual
        ctx.save_for_backward(x, kept_residual, kept_y, weight, bias, stats)
        ctx.args = training, act, slope
        ctx.eps = eps
        ctx.mark_non_differentiable(new_mean, new_var)
        ctx.set_materialize_grads(False)
        return y, new_mean, new_var

    @staticmethod
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        if dy is None:
            return (None,) * 11
        wanted = need_dx, need_dresidual, need_dweight, need_dbias
        if torch.is_grad_enabled():
            return *_differentiable(ctx, dy, wanted), *(None,) * 7
        x, residual, y, weight, bias, stats = ctx.saved_tensors
        masks = ctx.args[1] != _IDENTITY  # else the residual's gradient is dy itself
        dx, dresidual, dweight, dbias = _BWD(
            dy, x, residual, y, weight, bias, stats, *ctx.args,
            need_dx, need_dresidual and masks, need_dweight, need_dbias,
        )  # fmt: skip
        dresidual = dresidual if masks else dy
        found = dx, dresidual, dweight, dbias
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), *(None,) * 7


def _differentiable(
    ctx: Any, dy: torch.Tensor, wanted: tuple[bool, ...]
) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again, through the formula."""
    x, residual, y, weight, bias, stats = ctx.saved_tensors
    training, act, slope = ctx.args
    if act == _IDENTITY or y is not None:
        # What reaches the residual and the normalised value, linear in dy.
        g = dy if y is None else dy * torch.where(y.detach() > 0, 1.0, slope if act > 1 else 0.0)
        formula = _formula(training, ctx.eps, stats, "identity", slope)
        inputs = wanted[0], *wanted[2:]
        dx, dweight, dbias = _dispatch.differentiate(formula, (x, weight, bias), inputs, (g,))
        return [dx, g if wanted[1] else None, dweight, dbias]
    formula = _formula(training, ctx.eps, stats, ACTIVATIONS[act], slope)
    order = x, weight, bias, residual
    found = _dispatch.differentiate(
        formula, order, (wanted[0], wanted[2], wanted[3], wanted[1]), (dy,)
    )
    return [found[0], found[3], found[1], found[2]]


def _formula(
    training: bool, eps: float, stats: torch.Tensor, activation: str, slope: float
) -> Callable[..., torch.Tensor]:
    """The formula, with the statistics of the forward where they are constants."""

    def formula(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        mean, rstd = stats[0] + stats[1], stats[2]
        if training:
            mean, var = reference.moments(x)
            rstd = torch.rsqrt(var + eps)
        return reference.normalize(x, mean, rstd, weight, bias, activation, slope, residual)

    return formula
