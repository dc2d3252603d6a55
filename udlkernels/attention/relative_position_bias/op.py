"""relative_position_bias: checks, choice of implementation, schemas, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from udlkernels import _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.attention.relative_position_bias import reference

_OP = "relative_position_bias"
_INTEGERS = (torch.int64, torch.int32)


def relative_position_bias(
    table: torch.Tensor, index: torch.Tensor, *, implementation: str = "auto"
) -> torch.Tensor:
    r"""A bias for each query, key and head, from a table over relative positions.

    .. math:: b_{hts} = \text{table}_{\text{index}_{ts},\, h}

    `udlkernels.attention.swin_index` and `t5_index` make the usual indices.

    Args:
        table: [n, H], float32, float64, bfloat16 or float16; has a gradient.
        index: [T, S], int32 or int64, from 0 to n - 1.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [H, T, S], contiguous, of the table's type: the bias that `attention` takes.

    Raises:
        ArgumentError: shapes, types or devices that do not fit; an index outside of the table.
            The latter is looked for on the CPU only, before memory is touched. On a GPU nothing
            is read or written for such an index, and its bias is NaN. Compiled code raises
            RuntimeError.

    Numerical error: none forward. A gradient is summed in float32 (float64 for float64) over
    chunks of positions, and in float64 over those.

    Source: section 12.10; Liu et al., 2021, "Swin Transformer"; Raffel et al., 2020, "Exploring
    the Limits of Transfer Learning with a Unified Text-to-Text Transformer".
    """
    if not (
        table.dim() == index.dim() == 2
        and table.dtype.is_floating_point
        and index.dtype in _INTEGERS
        and table.device == index.device
    ):
        _check(table, index)
    if not (implementation in ("auto", "kernel") and kernel_ready(table) and _plain_index(index)):
        reasons = kernel_reasons(table)
        if not _plain_index(index):
            reasons.append("the index has no elements, or is a tensor subclass")
        choice = choose(
            _OP,
            implementation,
            reasons,
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(table, index),
        )
        if choice == "reference":
            _check_values(table, index)
            return reference.relative_position_bias(table, index)
    if not table.is_contiguous():
        table = table.contiguous()
    if not index.is_contiguous():
        index = index.contiguous()
    if is_dynamo_compiling():
        return _bias(table, index)
    try:
        return _bias(table, index)
    except RuntimeError:
        _check_values(table, index)
        raise


def _plain_index(index: torch.Tensor) -> bool:
    return type(index) in (torch.Tensor, torch.nn.Parameter) and index.numel() != 0


def _check(table: torch.Tensor, index: torch.Tensor) -> None:
    if table.dim() != 2 or not table.dtype.is_floating_point:
        raise ArgumentError(_OP, "table", "floating point, shape [n, H]", describe(table))
    if index.dim() != 2 or index.dtype not in _INTEGERS:
        raise ArgumentError(_OP, "index", "int32 or int64, shape [T, S]", describe(index))
    wanted = f"a tensor on {table.device} (the table's device)"
    raise ArgumentError(_OP, "index", wanted, index.device)


def _check_values(table: torch.Tensor, index: torch.Tensor) -> None:
    """Raises where an index on the CPU, of no transform, lies outside of the table."""
    if not index.is_cpu or index.numel() == 0 or torch._C._are_functorch_transforms_active():
        return
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= table.shape[0]:
        wanted = f"values from 0 to {table.shape[0] - 1} (the table's rows)"
        raise ArgumentError(_OP, "index", wanted, f"{low} to {high}")


def _bias(table: torch.Tensor, index: torch.Tensor) -> Any:
    if needs_grad(table):
        return _RelativePositionBias.apply(table, index)
    return _FWD(table, index)


def _sums(dout: torch.Tensor, index: torch.Tensor, rows: int) -> Any:
    return _BWD(dout if dout.is_contiguous() else dout.contiguous(), index, rows)


def _fake_fwd(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return table.new_empty((table.shape[1], *index.shape))


def _fake_bwd(dout: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    return dout.new_empty((n, dout.shape[0]))


_FWD = _library.define(
    "relative_position_bias_fwd(Tensor table, Tensor index) -> Tensor", _fake_fwd
)
_BWD = _library.define(
    "relative_position_bias_bwd(Tensor dout, Tensor index, SymInt n) -> Tensor", _fake_bwd
)
_library.launchers(
    "udlkernels.attention.relative_position_bias.kernels",
    "relative_position_bias_fwd",
    "relative_position_bias_bwd",
)


class _RelativePositionBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Any, index: Any) -> Any:
        ctx.save_for_backward(index)
        ctx.rows = table.shape[0]
        return _FWD(table, index)

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        (index,) = ctx.saved_tensors
        sums = _Sums.apply if torch.is_grad_enabled() else _sums
        return sums(dout, index, ctx.rows), None


class _Sums(torch.autograd.Function):
    """The gradient to the table: linear in dout, and so differentiable again by the op itself."""

    @staticmethod
    def forward(ctx: Any, dout: Any, index: Any, rows: Any) -> Any:
        ctx.save_for_backward(index)
        return _sums(dout, index, rows)

    @staticmethod
    def backward(ctx: Any, dtable: Any) -> Any:
        (index,) = ctx.saved_tensors
        return _bias(dtable if dtable.is_contiguous() else dtable.contiguous(), index), None, None
