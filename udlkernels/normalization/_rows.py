"""What the row norms (layer_norm, rms_norm and their add_ forms) check alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from udlkernels._dispatch import describe
from udlkernels._errors import ArgumentError


def shapes_fit(
    x: torch.Tensor, normalized_shape: Sequence[int], *params: torch.Tensor | None
) -> bool:
    """Whether x ends in normalized_shape and every parameter has just that shape."""
    if isinstance(normalized_shape, int):
        return False
    shape = tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        return False
    for param in params:
        if param is not None and param.shape != shape:
            return False
    return True


def width(normalized_shape: Sequence[int]) -> int:
    return normalized_shape[0] if len(normalized_shape) == 1 else math.prod(normalized_shape)


def shape_reasons(
    x: torch.Tensor, normalized_shape: Sequence[int], **params: torch.Tensor | None
) -> list[str]:
    """Why the shapes do not fit, in words."""
    if isinstance(normalized_shape, int):
        return [f"normalized_shape is the number {normalized_shape}, not a sequence"]
    shape, dims = tuple(normalized_shape), len(normalized_shape)
    if dims == 0:
        return ["normalized_shape is empty"]
    if tuple(x.shape[-dims:]) != shape:
        return [f"normalized_shape {list(shape)} is not how the input's {list(x.shape)} ends"]
    return [
        f"{name} has shape {list(param.shape)}, not normalized_shape {list(shape)}"
        for name, param in params.items()
        if param is not None and tuple(param.shape) != shape
    ]


def check_add_norm(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    normalized_shape: Sequence[int],
    eps: float | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    **params: torch.Tensor | None,
) -> None:
    """Raises for arguments that no implementation of an add_ form can take."""
    if not x.dtype.is_floating_point:
        raise ArgumentError(op, "x", "a floating point tensor", x.dtype)
    for name, tensor in {"residual": residual, **params}.items():
        if tensor is not None and tensor.device != x.device:
            raise ArgumentError(op, name, f"a tensor on {x.device} (x's device)", tensor.device)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ArgumentError(op, "residual", f"{describe(x)} (as x)", describe(residual))
    reasons = shape_reasons(x, normalized_shape, **params)
    if reasons:
        raise ArgumentError(op, "shapes", "shapes that fit together", "; ".join(reasons))
    check_eps(op, eps)
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(op, "dropout_p", "a probability in [0, 1]", dropout_p)
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ArgumentError(op, "seed", "an int64 tensor of one value", describe(seed))
    if seed is not None and seed.device != x.device:
        raise ArgumentError(op, "seed", f"a tensor on {x.device} (x's device)", seed.device)


def check_eps(op: str, eps: float | None) -> None:
    if eps is not None and not 0.0 <= eps < math.inf:
        raise ArgumentError(op, "eps", "a finite number >= 0", eps)
