"""merge_lse: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.attention.attention.sdpa import result
from udlkernels.attention.merge_lse import reference

_OP = "merge_lse"


def merge_lse(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    layout: str = "bhtd",
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Results of attention over two disjoint sets of keys, as one over all of them.

    .. math:: \ell = \log(e^{\ell_a} + e^{\ell_b}), \qquad
        o = e^{\ell_a - \ell} o_a + e^{\ell_b - \ell} o_b

    Args:
        out_a: [..., T, D], float32, float64, bfloat16 or float16.
        lse_a: [..., T], natural logarithm of each row's denominator, as `attention` returns it
            with return_lse; float32 (float64 for float64).
        out_b: as out_a.
        lse_b: as lse_a.
        layout: "bhtd", or "bthd" for out_a and out_b [B, T, H, D] beside lse_a and lse_b [B, H, T].
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        (out, lse) of the shapes and types of out_a and lse_a, contiguous. A part whose logarithm
        is -inf gives nothing, not even NaN; where both are, out is 0 and lse -inf.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, an unknown layout.

    Numerical error: the shares are logistic functions of the logarithms' difference, in float32
    (float64 for float64), so that they sum to 1 whatever the size of the logarithms.

    Source: section 12.2; Dao et al., 2022, "FlashAttention"; Rabe and Staats, 2021,
    "Self-attention Does Not Need O(n^2) Memory".
    """
    heads_last = layout == "bthd"
    if not heads_last and layout != "bhtd":
        raise ArgumentError(_OP, "layout", "'bhtd' or 'bthd'", repr(layout))
    if not _fits(out_a, lse_a, out_b, lse_b, heads_last):
        _check(out_a, lse_a, out_b, lse_b, heads_last)
    tensors = out_a, lse_a, out_b, lse_b
    if not (implementation in ("auto", "kernel") and kernel_ready(*tensors)):
        choice = choose(
            _OP,
            implementation,
            kernel_reasons(*tensors),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(*tensors),
        )
        if choice == "reference":
            return reference.merge_lse(*tensors, layout=layout)
    if heads_last:
        out, lse = _merge(
            out_a.transpose(1, 2), lse_a, out_b.transpose(1, 2), lse_b, heads_last=True
        )
        return out.transpose(1, 2), lse
    if out_a.dim() == 4:
        return _merge(*tensors, heads_last=False)
    rows, width = out_a.shape[-2:]
    out, lse = _merge(
        out_a.reshape(1, -1, rows, width), lse_a.reshape(1, -1, rows),
        out_b.reshape(1, -1, rows, width), lse_b.reshape(1, -1, rows), heads_last=False,
    )  # fmt: skip
    return out.reshape(out_a.shape), lse.reshape(lse_a.shape)


def _fits(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, heads_last: bool) -> bool:
    shape = out_a.shape
    if len(shape) < 2 or (heads_last and len(shape) != 4):
        return False
    rows = (shape[0], shape[2], shape[1]) if heads_last else shape[:-1]
    return bool(
        out_b.shape == shape
        and lse_a.shape == lse_b.shape == rows
        and out_a.dtype == out_b.dtype
        and out_a.dtype.is_floating_point
        and lse_a.dtype == lse_b.dtype == _wide(out_a.dtype)
        and out_a.device == lse_a.device == out_b.device == lse_b.device
    )


def _check(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, heads_last: bool) -> None:
    """Raises with the words for what `_fits` found."""
    order = "[B, T, H, D]" if heads_last else "[..., T, D]"
    shape, dtype = list(out_a.shape), out_a.dtype
    if not dtype.is_floating_point or (len(shape) != 4 if heads_last else len(shape) < 2):
        raise ArgumentError(_OP, "out_a", f"floating point, shape {order}", describe(out_a))
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        if tensor.device != out_a.device:
            wanted = f"a tensor on {out_a.device} (out_a's device)"
            raise ArgumentError(_OP, name, wanted, tensor.device)
    if list(out_b.shape) != shape or out_b.dtype != dtype:
        raise ArgumentError(_OP, "out_b", f"{dtype}, shape {shape} (out_a's)", describe(out_b))
    rows = [shape[0], shape[2], shape[1]] if heads_last else shape[:-1]
    for name, tensor in (("lse_a", lse_a), ("lse_b", lse_b)):
        if list(tensor.shape) != rows or tensor.dtype != _wide(dtype):
            wanted = f"{_wide(dtype)}, shape {rows} (for out_a {shape})"
            raise ArgumentError(_OP, name, wanted, describe(tensor))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, heads_last: bool) -> Any:
    """The kernels, on outputs [B, H, T, D] and logarithms [B, H, T]."""
    out_a, out_b = _rows(out_a), _rows(out_b)
    if needs_grad(out_a, lse_a, out_b, lse_b):
        return _MergeLse.apply(out_a, lse_a, out_b, lse_b, heads_last)
    return _FWD(out_a, lse_a, out_b, lse_b, heads_last)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _fake_fwd(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, heads_last: bool) -> Any:
    return result(out_a, out_a.shape[3], heads_last), lse_a.new_empty(lse_a.shape)


def _fake_bwd(
    dout: Any, dlse: Any, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, heads_last: bool,
    need_out: bool, need_lse: bool,
) -> Any:  # fmt: skip
    def gradient() -> torch.Tensor:
        if need_out:
            return result(out_a, out_a.shape[3], heads_last)
        return out_a.new_empty((0,), dtype=torch.float32)

    def lse_gradient() -> torch.Tensor:
        if need_lse:
            return lse_a.new_empty(lse_a.shape)
        return lse_a.new_empty((0,), dtype=torch.float32)

    return gradient(), lse_gradient(), gradient(), lse_gradient()


_FWD = _library.define(
    "merge_lse_fwd(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, bool heads_last)"
    " -> (Tensor out, Tensor lse)",
    _fake_fwd,
)
_BWD = _library.define(
    "merge_lse_bwd(Tensor dout, Tensor? dlse, Tensor out_a, Tensor lse_a, Tensor out_b,"
    " Tensor lse_b, bool heads_last, bool need_out, bool need_lse)"
    " -> (Tensor dout_a, Tensor dlse_a, Tensor dout_b, Tensor dlse_b)",
    _fake_bwd,
)
_library.launchers("udlkernels.attention.merge_lse.kernels", "merge_lse_fwd", "merge_lse_bwd")


class _MergeLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, heads_last: bool) -> Any:
        ctx.save_for_backward(out_a, lse_a, out_b, lse_b)
        ctx.heads_last = heads_last
        ctx.set_materialize_grads(False)
        return _FWD(out_a, lse_a, out_b, lse_b, heads_last)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            found = _dispatch.differentiate(reference.merge_lse, tensors, wanted, (dout, dlse))
            return *found, None
        dout = torch.zeros_like(tensors[0]) if dout is None else _rows(dout)
        need_out, need_lse = wanted[0] or wanted[2], wanted[1] or wanted[3]
        found = _BWD(dout, dlse, *tensors, ctx.heads_last, need_out, need_lse)
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), None
