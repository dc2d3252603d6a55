"""The Triton kernels of spectral_norm, and their launches.

Traffic per element and training step of one iteration: three reads of the matrix and one write
(a matrix that fits the L2 cache crosses memory once); backward reads the matrix once, dy twice and
writes the gradient. No sum is split between programs, so their order depends on the extents alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels._errors import ArgumentError
from udlkernels.normalization import _channel_kernels as shared

BLOCK = 1024  # columns of a pass over a row
ROWS, COLS = 16, 64  # tile of the product from the left


@triton.jit
def _dots_kernel(
    a_ptr, b_ptr, out_ptr, b_stride, n_cols, ACC: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """out[row] = sum of a[row] * b[row], where b is one vector if its stride is 0."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_COLS], ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        at = start + tl.arange(0, BLOCK_COLS)
        a = tl.load(a_ptr + row * n_cols + at, mask=at < n_cols, other=0.0).to(ACC)
        b = tl.load(b_ptr + row * b_stride + at, mask=at < n_cols, other=0.0).to(ACC)
        total += a * b
    tl.store(out_ptr + row, tl.sum(total, 0))


@triton.jit
def _left_kernel(
    a_ptr, u_ptr, out_ptr, n_rows, n_cols,
    ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = u^T a for BLOCK_COLS columns."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for start in range(0, n_rows, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        a = tl.load(a_ptr + row[:, None] * n_cols + col[None, :], mask=mask, other=0.0).to(ACC)
        total += a * tl.load(u_ptr + row, mask=row < n_rows, other=0.0)[:, None]
    tl.store(out_ptr + col, tl.sum(total, 0), mask=col < n_cols)


@triton.jit
def _scale_kernel(
    a_ptr, u_ptr, v_ptr, sigma_ptr, dot_ptr, out_ptr, n_cols,
    BACKWARD: tl.constexpr, ACC: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """a / sigma, or with BACKWARD (a - dot u v^T) / sigma."""
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = at < n_cols
    a = tl.load(a_ptr + row * n_cols + at, mask=mask, other=0.0).to(ACC)
    if BACKWARD:
        factor = tl.load(dot_ptr) * tl.load(u_ptr + row)
        a -= factor * tl.load(v_ptr + at, mask=mask, other=0.0)
    out = (a / tl.load(sigma_ptr)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * n_cols + at, out, mask=mask)


def _dots(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty((a.shape[0],), dtype=shared.acc_dtype(a))
    n = a.shape[1]
    _dots_kernel[(a.shape[0],)](
        a, b, out, b.stride(0) if b.dim() == 2 else 0, n,
        ACC=shared.acc(a), BLOCK_COLS=shared.blocks(n, BLOCK),
    )  # fmt: skip
    return out


def _left(a: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    out = a.new_empty((a.shape[1],), dtype=shared.acc_dtype(a))
    _left_kernel[(triton.cdiv(a.shape[1], COLS),)](
        a, u, out, *a.shape, ACC=shared.acc(a), BLOCK_ROWS=ROWS, BLOCK_COLS=COLS
    )
    return out


def _unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / x.double().square().sum().sqrt().clamp_min(eps).to(x.dtype)


def _scale(
    a: torch.Tensor, u: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor, dot: torch.Tensor | None
) -> torch.Tensor:
    out = a.new_empty(a.shape)
    block = shared.blocks(a.shape[1], BLOCK)
    _scale_kernel[(triton.cdiv(a.shape[1], block), a.shape[0])](
        a, u, v, sigma, sigma if dot is None else dot, out, a.shape[1],
        BACKWARD=dot is not None, ACC=shared.acc(a), BLOCK_COLS=block,
    )  # fmt: skip
    return out


def spectral_norm_fwd(
    weight: torch.Tensor,
    u: torch.Tensor | None,
    v: torch.Tensor | None,
    iterations: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    matrix = weight.reshape(weight.shape[0], -1).contiguous()
    wide = shared.acc_dtype(weight)
    # Copies: an op's results must not be its arguments.
    left, right = (None if t is None else t.to(wide, copy=True).contiguous() for t in (u, v))
    if left is not None:
        for _ in range(iterations):
            right = _unit(_left(matrix, left), eps)
            left = _unit(_dots(matrix, right), eps)
        right = _unit(_left(matrix, left), eps) if right is None else right
    elif right is not None:
        for _ in range(iterations):
            left = _unit(_dots(matrix, right), eps)
            right = _unit(_left(matrix, left), eps)
    if left is None or right is None:
        raise ArgumentError("spectral_norm", "u", "u, or v and an iteration", "neither")
    sigma = (_dots(matrix, right).double() * left).sum().to(wide).reshape(1)
    y = _scale(matrix, left, right, sigma, None).view(weight.shape)
    return y, left, right, sigma


def spectral_norm_bwd(
    dy: torch.Tensor, weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    matrix = weight.reshape(weight.shape[0], -1).contiguous()
    slope = dy.reshape(matrix.shape).contiguous()
    dot = _dots(matrix, slope).double().sum().to(u.dtype) / sigma
    return _scale(slope, u, v, sigma, dot).view(weight.shape)


_WIDE = ("u_ptr", "v_ptr", "sigma_ptr", "dot_ptr")
AOT = (
    *(
        shared.entry(
            f"spectral_norm {name}", fn, dtype,
            dict(BACKWARD=name == "bwd", ACC=tl.float32, BLOCK_COLS=BLOCK),
            wide=(*_WIDE, "out_ptr") if name == "dots" else _WIDE, aligned=("n_cols",),
        )
        for name, fn in (("dots", _dots_kernel), ("fwd", _scale_kernel), ("bwd", _scale_kernel))
        for dtype in ("bf16", "fp32")
    ),
    *(
        shared.entry(
            "spectral_norm left", _left_kernel, dtype,
            dict(ACC=tl.float32, BLOCK_ROWS=ROWS, BLOCK_COLS=COLS),
            wide=("u_ptr", "out_ptr"), aligned=("n_cols",),
        )
        for dtype in ("bf16", "fp32")
    ),
)  # fmt: skip
