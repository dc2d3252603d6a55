"""apply_rotary: checks, choice of implementation, schemas, gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from udlkernels import _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.attention.apply_rotary import reference

_OP = "apply_rotary"


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    layout: str = "bhtd",
    inplace: bool = False,
    implementation: str = "auto",
) -> torch.Tensor:
    r"""Rotary positions: pairs of each head's numbers, turned by an angle of their position.

    .. math:: y_a = x_a \cos\theta_{ti} - x_b \sin\theta_{ti}, \qquad
        y_b = x_b \cos\theta_{ti} + x_a \sin\theta_{ti}

    for pair i = 0 ... R / 2 - 1 of position t. The members (a, b) are (i, i + R / 2), or
    (2 i, 2 i + 1) where interleaved. Only the first R numbers of a head turn.

    Args:
        x: [B, H, T, D], queries or keys; float32, float64, bfloat16 or float16, with any strides.
        cos: [T, R / 2], or [B, T, R / 2] where positions differ by sample; R is even and at most
            D. Any floating point type.
        sin: as cos.
        interleaved: pairs of neighbours (GPT-J) instead of halves (GPT-NeoX, Llama).
        layout: "bhtd", or "bthd" for x [B, T, H, D].
        inplace: write into x, which may be a slice of a larger tensor, and return it.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        x's shape and type, contiguous; or x itself, with inplace.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, such as tables of full width R
            that repeat their values; an unknown layout; inplace where a gradient is needed, or
            on a tensor whose elements share memory.

    Numerical error: in float32 (float64 for float64), rounded once. cos and sin get gradients
    through the formula.

    Source: Su et al., 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """
    heads_last = layout == "bthd"
    if not heads_last and layout != "bhtd":
        raise ArgumentError(_OP, "layout", "'bhtd' or 'bthd'", repr(layout))
    if not _fits(x, cos, sin, heads_last):
        _check(x, cos, sin, heads_last)
    if inplace:
        _check_inplace(x, cos, sin)
    if not (
        implementation in ("auto", "kernel")
        and kernel_ready(x, cos, sin)
        and not needs_grad(cos, sin)
    ):
        reasons = kernel_reasons(x, cos, sin)
        if needs_grad(cos, sin):
            reasons.append("cos or sin needs a gradient")
        choice = choose(
            _OP,
            implementation,
            reasons,
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(x, cos, sin),
        )
        if choice == "reference":
            y = reference.apply_rotary(x, cos, sin, interleaved=interleaved, layout=layout)
            return x.copy_(y) if inplace else y
    cos, sin = _tables(x, cos, sin)
    if not inplace:
        return _rotate(x, cos, sin, interleaved, False, heads_last)
    if x.stride(3) != 1:
        return x.copy_(_rotate(x, cos, sin, interleaved, False, heads_last))
    _INPLACE(x, cos, sin, interleaved, False, heads_last)
    if not (is_dynamo_compiling() or x.is_inference()):
        torch.autograd.graph.increment_version(x)
    return x


def _fits(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_last: bool) -> bool:
    a, b = x.shape, cos.shape
    return (
        len(a) == 4
        and b == sin.shape
        and len(b) in (2, 3)
        and (len(b) == 2 or b[0] == a[0])
        and b[-2] == a[1 if heads_last else 2]
        and 0 < 2 * b[-1] <= a[3]
        and x.dtype.is_floating_point
        and cos.dtype.is_floating_point
        and sin.dtype.is_floating_point
        and x.device == cos.device == sin.device
    )


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_last: bool) -> None:
    """Raises with the words for what `_fits` found."""
    order = "[B, T, H, D]" if heads_last else "[B, H, T, D]"
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ArgumentError(_OP, "x", f"floating point, 4 dimensions {order}", describe(x))
    batch, rows, width = x.shape[0], x.shape[1 if heads_last else 2], x.shape[3]
    for name, table in (("cos", cos), ("sin", sin)):
        if table.device != x.device:
            raise ArgumentError(_OP, name, f"a tensor on {x.device} (x's device)", table.device)
        shape = tuple(table.shape)
        leading = shape[:-1] in ((rows,), (batch, rows))
        if not (table.dtype.is_floating_point and leading):
            wanted = f"floating point, shape [{rows}, R / 2] or [{batch}, {rows}, R / 2]"
            raise ArgumentError(_OP, name, f"{wanted} (x is {order})", describe(table))
        if not 0 < 2 * shape[-1] <= width:
            hint = "hint: of a table that repeats its values for both halves, pass [..., : R // 2]"
            wanted = f"a last dimension of R / 2, with 0 < R <= {width} (x's width; {hint})"
            raise ArgumentError(_OP, name, wanted, list(shape))
    raise ArgumentError(_OP, "sin", f"shape {list(cos.shape)} (cos's)", list(sin.shape))


def _check_inplace(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if needs_grad(x, cos, sin):
        wanted = "False where a gradient is needed (hint: torch.no_grad(), where it is not)"
        raise ArgumentError(_OP, "inplace", wanted, True)
    if any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)):
        raise ArgumentError(
            _OP, "x", "elements that share no memory, to write inplace", describe(x)
        )


def _tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """cos and sin of one type that the kernels take beside x, with contiguous rows."""
    if cos.dtype != sin.dtype or (cos.dtype == torch.float64) != (x.dtype == torch.float64):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = cos.to(wide), sin.to(wide)
    if cos.stride(-1) != 1:
        cos = cos.contiguous()
    if sin.stride(-1) != 1:
        sin = sin.contiguous()
    return cos, sin


def _rotate(x: Any, cos: Any, sin: Any, interleaved: bool, inverse: bool, heads_last: bool) -> Any:
    if needs_grad(x):
        return _Rotary.apply(x, cos, sin, interleaved, inverse, heads_last)
    if x.stride(3) != 1:
        x = x.contiguous()
    return _ROTARY(x, cos, sin, interleaved, inverse, heads_last)


def _fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_inplace(x: torch.Tensor, *args: Any) -> None:
    return None


_ROTARY = _library.define(
    "apply_rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse,"
    " bool heads_last) -> Tensor",
    _fake,
)
_INPLACE = _library.define(
    "apply_rotary_(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool inverse,"
    " bool heads_last) -> ()",
    _fake_inplace,
)
_library.launchers("udlkernels.attention.apply_rotary.kernels", "apply_rotary", "apply_rotary_")


class _Rotary(torch.autograd.Function):
    """Its gradient is the rotation back, which may be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, cos: Any, sin: Any, interleaved: bool, inverse: bool, heads_last: bool
    ) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.args = interleaved, inverse, heads_last
        return _rotate(x, cos, sin, *ctx.args)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        cos, sin = ctx.saved_tensors
        interleaved, inverse, heads_last = ctx.args
        dx = _rotate(dy, cos, sin, interleaved, not inverse, heads_last)
        return dx, None, None, None, None, None
