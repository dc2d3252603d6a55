"""The Triton kernels of weight_norm, and their launches: one program a row.

Traffic per element: forward reads v and writes w; backward reads dy and v and writes dv; the second
pass over a row reads the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels.normalization import _channel_kernels as shared

BLOCK = 2048  # columns of a pass


@triton.jit
def _weight_fwd_kernel(
    v_ptr, g_ptr, w_ptr, norm_ptr, n_cols, ACC: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    top = tl.zeros([BLOCK_COLS], ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + col < n_cols
        v = tl.load(v_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
        top = tl.maximum(top, tl.abs(v))
    limit: tl.constexpr = 1e150 if ACC == tl.float64 else 1e15
    largest = tl.max(top, 0)
    divisor = tl.where((largest > limit) & (largest < float("inf")), largest, 1.0)
    squares = tl.zeros([BLOCK_COLS], ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + col < n_cols
        v = tl.load(v_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC) / divisor
        squares += v * v
    norm = tl.sqrt(tl.sum(squares, 0)) * divisor
    tl.store(norm_ptr + row, norm)
    factor = tl.load(g_ptr + row).to(ACC) / norm
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + col < n_cols
        v = tl.load(v_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
        w = (v * factor).to(w_ptr.dtype.element_ty)
        tl.store(w_ptr + row * n_cols + start + col, w, mask=mask)


@triton.jit
def _weight_bwd_kernel(
    dy_ptr, v_ptr, g_ptr, norm_ptr, dv_ptr, dg_ptr, n_cols,
    DV: tl.constexpr, ACC: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)
    inverse = 1.0 / tl.load(norm_ptr + row)
    total = tl.zeros([BLOCK_COLS], ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + col < n_cols
        dy = tl.load(dy_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
        v = tl.load(v_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
        total += dy * (v * inverse)
    dg = tl.sum(total, 0)
    tl.store(dg_ptr + row, dg.to(dg_ptr.dtype.element_ty))
    if DV:
        factor = tl.load(g_ptr + row).to(ACC) * inverse
        for start in range(0, n_cols, BLOCK_COLS):
            mask = start + col < n_cols
            dy = tl.load(dy_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
            v = tl.load(v_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
            dv = ((dy - v * inverse * dg) * factor).to(dv_ptr.dtype.element_ty)
            tl.store(dv_ptr + row * n_cols + start + col, dv, mask=mask)


def weight_norm_fwd(v: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = v.shape[0], v.numel() // v.shape[0]
    w, norm = v.new_empty(v.shape), v.new_empty((rows,), dtype=shared.acc_dtype(v))
    _weight_fwd_kernel[(rows,)](
        v.contiguous(), g.contiguous(), w, norm, n,
        ACC=shared.acc(v), BLOCK_COLS=shared.blocks(n, BLOCK),
    )  # fmt: skip
    return w, norm


def weight_norm_bwd(
    dy: torch.Tensor, v: torch.Tensor, g: torch.Tensor, norm: torch.Tensor, need_dv: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, n = v.shape[0], v.numel() // v.shape[0]
    dv = v.new_empty(v.shape) if need_dv else v.new_empty((0,), dtype=torch.float32)
    dg = g.new_empty(g.shape)
    _weight_bwd_kernel[(rows,)](
        dy.contiguous(), v.contiguous(), g.contiguous(), norm, dv if need_dv else v, dg, n,
        DV=need_dv, ACC=shared.acc(v), BLOCK_COLS=shared.blocks(n, BLOCK),
    )  # fmt: skip
    return dv, dg


AOT = tuple(
    shared.entry(
        f"weight_norm {name}", fn, dtype, dict(DV=True, ACC=tl.float32, BLOCK_COLS=BLOCK),
        wide=("norm_ptr",), aligned=("n_cols",),
    )
    for name, fn in (("fwd", _weight_fwd_kernel), ("bwd", _weight_bwd_kernel))
    for dtype in ("bf16", "fp32")
)  # fmt: skip
