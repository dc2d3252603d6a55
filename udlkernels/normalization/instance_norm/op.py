"""instance_norm and adaptive_instance_norm: checks and choice of implementation.

Both are group_norm with a group for each channel, and run on its ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.normalization import _rows
from udlkernels.normalization.group_norm.op import FWD, GroupNorm, is_channels_last
from udlkernels.normalization.instance_norm import reference


def instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Instance normalization: every channel of every sample with statistics of its own.

    .. math:: y = \frac{x - \mu_{bc}}{\sqrt{\sigma_{bc}^2 + \epsilon}} w_c + b_c

    Args:
        input: [B, C, ...] with at least two positions; float32, float64, bfloat16 or float16 for
            the kernels, and whatever else PyTorch's op takes.
        running_mean, running_var: [C], moved in place towards the mean over the samples of their
            statistics (the variance unbiased); both or neither.
        weight: [C] or None for ones; may be wider than the input's type.
        bias: [C] or None for zeros.
        use_input_stats: False normalises with the running statistics instead.
        momentum: the share of the new statistics in the running ones.
        eps: added to the variance.
        implementation: "auto", "kernel", "torch" or "reference". Frozen statistics
            (use_input_stats=False) are PyTorch's op's.

    Returns:
        [B, C, ...], contiguous (as PyTorch's), of the input's type.

    Raises:
        ArgumentError: an unknown `implementation`, or one that cannot serve.
        RuntimeError, ValueError: as torch.nn.functional.instance_norm.

    Numerical error: as group_norm.

    Source: section 11.4; Ulyanov, Vedaldi and Lempitsky, 2016, "Instance Normalization".
    """
    tensors = weight, bias, running_mean, running_var
    if not (
        implementation in ("auto", "kernel")
        and use_input_stats
        and kernel_ready(input, *tensors)
        and _fits(input, *tensors)
    ):
        choice = choose(
            "instance_norm",
            implementation,
            kernel_reasons(input, *tensors) + _reasons(input, use_input_stats, *tensors),
            inputs=describe(input, *tensors),
        )
        arguments = (running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        if choice == "torch":
            return F.instance_norm(input, *arguments)
        if choice == "reference":
            return reference.instance_norm(input, *arguments)
    groups = input.shape[1]
    if running_mean is None or running_var is None:
        if needs_grad(input, weight, bias):
            return GroupNorm.apply(input, weight, bias, None, groups, eps, 0, 0.0, False, False)
        return FWD(input, weight, bias, None, groups, eps, 0, 0.0, False)[0]
    if needs_grad(input, weight, bias):
        y, stats = GroupNorm.apply(input, weight, bias, None, groups, eps, 0, 0.0, False, True)
    else:
        y, stats = FWD(input, weight, bias, None, groups, eps, 0, 0.0, False)
    positions = input.numel() // (input.shape[0] * groups)
    mean, var = stats[0], stats[2] * (positions / (positions - 1))
    reference.update_running(running_mean, mean.to(running_mean.dtype), momentum)
    reference.update_running(running_var, var.to(running_var.dtype), momentum)
    return y


def adaptive_instance_norm(
    input: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Instance normalization whose weight and bias come with each sample, such as a style.

    .. math:: y = \frac{x - \mu_{bc}}{\sqrt{\sigma_{bc}^2 + \epsilon}} s_{bc} + t_{bc}

    Args:
        input: [B, C, ...] with at least two positions, float32, float64, bfloat16 or float16.
        scale: [B, C]; may be wider than the input's type.
        shift: [B, C].
        eps: added to the variance.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [B, C, ...] of the input's type, channels-last where the input is, else contiguous.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, a single position, eps below 0 or
            not finite.

    Numerical error: as group_norm.

    Source: Huang and Belongie, 2017, "Arbitrary Style Transfer in Real-time with Adaptive Instance
    Normalization"; the generators of section 15.4.
    """
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(input, scale, shift)
        and input.dim() > 2
        and input.numel() > input.shape[0] * input.shape[1]
        and scale.shape == input.shape[:2]
        and shift.shape == input.shape[:2]
        and 0.0 <= eps < float("inf")
    ):
        _check_adaptive(input, scale, shift, eps)
        choice = choose(
            "adaptive_instance_norm",
            implementation,
            kernel_reasons(input, scale, shift),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(input, scale, shift),
        )
        if choice == "reference":
            return reference.adaptive_instance_norm(input, scale, shift, eps)
    args = input.shape[1], eps, 0, 0.0, is_channels_last(input)
    if needs_grad(input, scale, shift):
        return GroupNorm.apply(input, scale, shift, None, *args, False)
    return FWD(input, scale, shift, None, *args)[0]


def _fits(x: torch.Tensor, *params: torch.Tensor | None) -> bool:
    if x.dim() < 3 or x.numel() == x.shape[0] * x.shape[1]:
        return False
    if (params[2] is None) != (params[3] is None):
        return False
    shape = x.shape[1:2]
    for param in params:
        if param is not None and param.shape != shape:
            return False
    return True


def _reasons(x: torch.Tensor, use_input_stats: bool, *params: torch.Tensor | None) -> list[str]:
    """Why the arguments do not fit, in words."""
    if not use_input_stats:
        return ["frozen statistics (use_input_stats=False) leave nothing to reduce"]
    if x.dim() < 3 or x.numel() == x.shape[0] * x.shape[1]:
        return [f"shape {list(x.shape)} has a single position for each channel"]
    if (params[2] is None) != (params[3] is None):
        return ["only one of running_mean and running_var is given"]
    names = ("weight", "bias", "running_mean", "running_var")
    return [
        f"{name} has shape {list(param.shape)}, not [{x.shape[1]}] (the input's channels)"
        for name, param in zip(names, params, strict=True)
        if param is not None and param.shape != x.shape[1:2]
    ]


def _check_adaptive(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> None:
    """Raises for arguments that no implementation of adaptive_instance_norm can take."""
    op = "adaptive_instance_norm"
    if not x.dtype.is_floating_point:
        raise ArgumentError(op, "input", "a floating point tensor", x.dtype)
    if x.dim() < 3 or x[:1, :1].numel() == 1:
        raise ArgumentError(op, "input", "[B, C, ...] with at least two positions", list(x.shape))
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.device != x.device:
            raise ArgumentError(op, name, f"a tensor on {x.device} (input's device)", tensor.device)
        if tensor.shape != x.shape[:2]:
            raise ArgumentError(
                op, name, f"shape {list(x.shape[:2])} (input's samples and channels)",
                list(tensor.shape),
            )  # fmt: skip
    _rows.check_eps(op, eps)
