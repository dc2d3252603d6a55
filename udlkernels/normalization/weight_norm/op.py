"""weight_norm: checks, choice of implementation, schemas, gradients."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _dispatch, _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.normalization.weight_norm import reference


def weight_norm(
    v: torch.Tensor, g: torch.Tensor, dim: int | None = 0, *, implementation: str = "auto"
) -> torch.Tensor:
    r"""Weight normalization: a tensor as directions and lengths.

    .. math:: w = g \, \frac{v}{\lVert v \rVert}

    Args:
        v: [d_0, d_1, ...], float32, float64, bfloat16 or float16.
        g: the lengths: as v with every dimension but `dim` of size 1, or a single value where the
            norm is that of the whole tensor; may be wider than v's type.
        dim: the dimension whose entries have a norm each; None or -1 takes one norm of the whole
            tensor, as torch.nn.utils.parametrizations.weight_norm does.
        implementation: "auto", "kernel", "torch" or "reference".

    Returns:
        [d_0, d_1, ...], contiguous, of v's type.

    Raises:
        ArgumentError: a dim outside v, or a g that does not fit.

    Numerical error: norms are summed in float32 (float64 for float64), scaled by the largest value
    where squares of finite values overflow. A zero v gives NaN, as in PyTorch.

    Source: Salimans and Kingma, 2016, "Weight Normalization".
    """
    ready = implementation in ("auto", "kernel") and kernel_ready(v, g)
    if ready and dim == 0 and g.dim() == v.dim() > 0 and g.numel() == g.shape[0] == v.shape[0]:
        return _rows_norm(v, g)
    dim = _check(v, g, -1 if dim is None else dim)
    if not ready:
        mixed = v.dtype != g.dtype
        choice = choose(
            "weight_norm",
            implementation,
            kernel_reasons(v, g),
            torch_reasons=("PyTorch's op wants v and g in one type",) if mixed else (),
            inputs=describe(v, g),
        )
        if choice == "torch":
            return torch._weight_norm(v, g, dim)
        if choice == "reference":
            return reference.weight_norm(v, g, dim)
    if dim == 0:
        return _rows_norm(v, g)
    if dim == -1:
        return _rows_norm(v.reshape(1, -1), g).view(v.shape)
    return _rows_norm(v.movedim(dim, 0), g).movedim(0, dim).contiguous()


def _rows_norm(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Every v[i] scaled to the length g[i]."""
    return _WeightNorm.apply(v, g) if needs_grad(v, g) else _FWD(v, g)[0]


def _check(v: torch.Tensor, g: torch.Tensor, dim: int) -> int:
    """dim as torch counts it: -1 for the whole tensor, otherwise from 0."""
    if not (v.dtype.is_floating_point or v.dtype.is_complex):
        raise ArgumentError("weight_norm", "v", "a floating point tensor", v.dtype)
    if not -1 <= dim < max(v.dim(), 1):
        raise ArgumentError("weight_norm", "dim", f"None or -1 to {v.dim() - 1}", dim)
    size = 1 if dim == -1 or v.dim() == 0 else v.shape[dim]
    ones = all(n == 1 or d == dim for d, n in enumerate(g.shape))
    if g.numel() != size or g.dim() not in (0, v.dim()) or not ones:
        shape = [] if dim == -1 else [size if d == dim else 1 for d in range(v.dim())]
        raise ArgumentError("weight_norm", "g", f"shape {shape}", describe(g))
    if g.device != v.device or g.dtype.is_floating_point != v.dtype.is_floating_point:
        expected = f"a {v.dtype}-like tensor on {v.device} (as v)"
        raise ArgumentError("weight_norm", "g", expected, describe(g))
    return -1 if v.dim() == 0 else dim


def _fake_fwd(v: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    return v.new_empty(v.shape), v.new_empty((v.shape[0],), dtype=dtype)


def _fake_bwd(
    dy: Any, v: torch.Tensor, g: torch.Tensor, norm: Any, need_dv: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dv = v.new_empty(v.shape) if need_dv else v.new_empty((0,), dtype=torch.float32)
    return dv, g.new_empty(g.shape)


_FWD = _library.define("weight_norm_fwd(Tensor v, Tensor g) -> (Tensor w, Tensor norm)", _fake_fwd)
_BWD = _library.define(
    "weight_norm_bwd(Tensor dy, Tensor v, Tensor g, Tensor norm, bool need_dv)"
    " -> (Tensor dv, Tensor dg)",
    _fake_bwd,
)
_library.launchers(
    "udlkernels.normalization.weight_norm.kernels", "weight_norm_fwd", "weight_norm_bwd"
)


class _WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Any, g: Any) -> Any:
        w, norm = _FWD(v, g)
        ctx.save_for_backward(v, g, norm)
        return w

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        v, g, norm = ctx.saved_tensors
        need_dv, need_dg = ctx.needs_input_grad
        if torch.is_grad_enabled():
            wanted = need_dv, need_dg
            return tuple(_dispatch.differentiate(_formula, (v, g), wanted, (dy,)))
        dv, dg = _BWD(dy, v, g, norm, need_dv)
        return dv if need_dv else None, dg if need_dg else None


def _formula(v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return reference.weight_norm(v, g, 0)
