"""group_norm and group_norm_act: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.normalization import _rows
from udlkernels.normalization._activation import ACTIVATIONS, activation_index
from udlkernels.normalization.group_norm import reference


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Group normalization: a sample's channels in groups, each with statistics of its own.

    .. math:: y = \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} w_c + b_c

    Args:
        input: [B, C, ...]; float32, float64, bfloat16 or float16 for the kernels, and whatever else
            PyTorch's op takes.
        num_groups: a divisor of C.
        weight: [C] or None for ones; may be wider than the input's type.
        bias: [C] or None for zeros.
        eps: added to the variance.
        implementation: "auto", "kernel", "torch" or "reference".

    Returns:
        [B, C, ...] of the input's type, channels-last where the input is, else contiguous.

    Raises:
        ArgumentError: an unknown `implementation`, or one that cannot serve.
        RuntimeError, ValueError, TypeError: as torch.nn.functional.group_norm.

    Numerical error: mean first, then squares around it, in float32 (float64 for float64), merged
    over blocks in float64: no cancellation, however large the mean. A group whose squares overflow
    although its values are finite is redone scaled by its largest value.

    Source: section 11.4; Wu and He, 2018, "Group Normalization".
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input, weight, bias)
        and _fits(input, num_groups, weight, bias)
    ):
        choice = choose(
            "group_norm",
            implementation,
            kernel_reasons(input, weight, bias) + _reasons(input, num_groups, weight, bias),
            inputs=describe(input, weight, bias),
        )
        if choice == "torch":
            return F.group_norm(input, num_groups, weight, bias, eps)
        if choice == "reference":
            return reference.group_norm(input, num_groups, weight, bias, eps)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()
    args = num_groups, eps, 0, 0.0, is_channels_last(input), False
    if needs_grad(input, weight, bias):
        return GroupNorm.apply(input, weight, bias, None, *args)
    return FWD(input, weight, bias, None, *args[:5])[0]


def group_norm_act(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    negative_slope: float = 0.01,
    residual: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Group normalization, an optional residual and an activation, in one pass over memory.

    .. math:: y = \text{act}(\text{group\_norm}(x) + \text{residual})

    The backward computes the activation's argument again from x, so that nothing of x's size is
    kept but x (and the residual).

    Args:
        input: [B, C, ...], float32, float64, bfloat16 or float16.
        num_groups, weight, bias, eps: as `group_norm`.
        activation: "identity", "relu", "leaky_relu", "gelu", "gelu_tanh" or "silu".
        negative_slope: leaky_relu's factor for negative values.
        residual: as input, added before the activation; None for none.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [B, C, ...] of the input's type, channels-last where the input is, else contiguous.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, an unknown activation, eps below 0
            or not finite.

    Numerical error: as group_norm; the result is rounded once, after the activation.

    Source: the residual blocks of diffusion models (chapter 18); Wu and He, 2018.
    """
    act = activation_index("group_norm_act", activation)
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input, weight, bias, residual)
        and _fits(input, num_groups, weight, bias)
        and (residual is None or (residual.shape == input.shape and residual.dtype == input.dtype))
        and 0.0 <= eps < float("inf")
    ):
        _check_act(input, num_groups, weight, bias, eps, residual)
        choice = choose(
            "group_norm_act",
            implementation,
            kernel_reasons(input, weight, bias, residual),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(input, weight, bias, residual),
        )
        if choice == "reference":
            return reference.group_norm_act(
                input, num_groups, weight, bias, eps, activation, negative_slope, residual
            )
    args = num_groups, eps, act, negative_slope, is_channels_last(input), False
    if needs_grad(input, weight, bias, residual):
        return GroupNorm.apply(input, weight, bias, residual, *args)
    return FWD(input, weight, bias, residual, *args[:5])[0]


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether PyTorch takes the strides of x for channels-last, and gives results so."""
    if x.dim() != 4 and x.dim() != 5:
        return False
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0 or strides[-1] < strides[1]:
        return False
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d]
    return True


def _fits(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> bool:
    if x.dim() < 2 or not isinstance(num_groups, int) or num_groups < 1:
        return False
    channels = x.shape[1]
    return (
        channels % num_groups == 0
        and x.numel() > num_groups
        and (weight is None or weight.shape == (channels,))
        and (bias is None or bias.shape == (channels,))
    )


def _reasons(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> list[str]:
    """Why the arguments do not fit, in words."""
    if x.dim() < 2:
        return [f"the input has {x.dim()} dimensions, not at least 2"]
    channels = x.shape[1]
    if not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups != 0:
        return [f"num_groups {num_groups} does not divide the input's {channels} channels"]
    if x.numel() == num_groups:
        return ["a group has a single value"]
    return [
        f"{name} has shape {list(param.shape)}, not [{channels}] (the input's channels)"
        for name, param in (("weight", weight), ("bias", bias))
        if param is not None and param.shape != (channels,)
    ]


def _check_act(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> None:
    """Raises for arguments that no implementation of group_norm_act can take."""
    op = "group_norm_act"
    if not x.dtype.is_floating_point:
        raise ArgumentError(op, "input", "a floating point tensor", x.dtype)
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ArgumentError(op, name, f"a tensor on {x.device} (input's device)", tensor.device)
    reasons = _reasons(x, num_groups, weight, bias)
    if reasons:
        raise ArgumentError(op, "arguments", "ones that fit together", "; ".join(reasons))
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ArgumentError(op, "residual", f"{describe(x)} (as input)", describe(residual))
    _rows.check_eps(op, eps)


def result_like(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    if not channels_last:
        return x.new_empty(x.shape)
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty_like(x, memory_format=layout)


def _fake_fwd(
    x: torch.Tensor, weight: Any, bias: Any, residual: Any, groups: int, eps: Any, act: Any,
    slope: Any, channels_last: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return result_like(x, channels_last), x.new_empty((4, x.shape[0], groups), dtype=dtype)


def _fake_bwd(
    dy: Any, x: torch.Tensor, weight: Any, bias: Any, residual: Any, stats: Any, groups: Any,
    act: int, slope: Any, channels_last: bool, need_dx: bool, need_dresidual: bool,
    need_dweight: bool, need_dbias: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    def given(wanted: bool, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(like.shape) if wanted else x.new_empty((0,), dtype=torch.float32)

    return (
        result_like(x, channels_last) if need_dx else given(False, x),
        result_like(x, channels_last) if need_dresidual and act else given(False, x),
        given(need_dweight, weight),
        given(need_dbias, bias),
    )


FWD = _library.define(
    "group_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int groups,"
    " float eps, int activation, float negative_slope, bool channels_last)"
    " -> (Tensor y, Tensor stats)",
    _fake_fwd,
)
BWD = _library.define(
    "group_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor stats, int groups, int activation, float negative_slope, bool channels_last,"
    " bool need_dx, bool need_dresidual, bool need_dweight, bool need_dbias)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _fake_bwd,
)
_library.launchers(
    "udlkernels.normalization.group_norm.kernels", "group_norm_fwd", "group_norm_bwd"
)


class GroupNorm(torch.autograd.Function):
    """The kernels under autograd; with_stats also returns the statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, residual: Any, groups: int, eps: float, act: int,
        slope: float, channels_last: bool, with_stats: bool,
    ) -> Any:  # fmt: skip
        y, stats = FWD(x, weight, bias, residual, groups, eps, act, slope, channels_last)
        ctx.save_for_backward(x, weight, bias, residual, stats)
        ctx.args = groups, eps, act, slope, channels_last
        if not with_stats:
            return y
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        x, weight, bias, residual, stats = ctx.saved_tensors
        groups, eps, act, slope, channels_last = ctx.args
        wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            name = ACTIVATIONS[act]

            def formula(x: Any, weight: Any, bias: Any, residual: Any) -> torch.Tensor:
                return reference.group_norm_act(x, groups, weight, bias, eps, name, slope, residual)

            tensors = x, weight, bias, residual
            found = _dispatch.differentiate(formula, tensors, wanted, (dy,))
            return *found, *(None,) * 6
        need_dx, need_dweight, need_dbias, need_dresidual = wanted
        dx, dresidual, dweight, dbias = BWD(
            dy, x, weight, bias, residual, stats, groups, act, slope, channels_last,
            need_dx, need_dresidual, need_dweight, need_dbias,
        )  # fmt: skip
        if need_dresidual and not act:
            dresidual = dy
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            dresidual if need_dresidual else None,
            *(None,) * 6,
        )
