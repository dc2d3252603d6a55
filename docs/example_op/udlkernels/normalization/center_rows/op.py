"""center_rows: checks, choice of implementation, schema, gradient."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.normalization.center_rows import reference


def center_rows(input: torch.Tensor, *, implementation: str = "auto") -> torch.Tensor:
    r"""Rows without their mean.

    .. math:: y = x - \frac{1}{N} \sum_i x_i

    Args:
        input: [..., N], float32, float64, bfloat16 or float16.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [..., N], contiguous, of the input's type.

    Raises:
        ArgumentError: an input without dimensions or of integers, an implementation that cannot
            serve.

    Numerical error: the mean is summed in float32, or float64 for float64.

    Source: the first step of layer normalization.
    """
    if not input.dtype.is_floating_point or input.ndim == 0:
        expected = "a floating point tensor of at least one dimension"
        raise ArgumentError("center_rows", "input", expected, describe(input))
    if not (implementation in ("auto", "kernel") and kernel_ready(input)):
        choice = choose(
            "center_rows",
            implementation,
            kernel_reasons(input),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(input),
        )
        if choice == "reference":
            return reference.center_rows(input)
    return _CenterRows.apply(input) if needs_grad(input) else _FWD(input)


def _fake_fwd(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


_FWD = _library.define("center_rows_fwd(Tensor x) -> Tensor", _fake_fwd)
_library.launchers("udlkernels.normalization.center_rows.kernels", "center_rows_fwd")


class _CenterRows(torch.autograd.Function):
    """Linear and symmetric, so its gradient is the op itself, which may be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        return _FWD(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return center_rows(dy)
