"""The Triton kernels of adaptive_layer_norm, and their launches.

Traffic per element: forward reads x and writes y (its later passes over a row read the caches);
backward reads dy and x and writes dx, and once more reads both for the sums of scale and shift.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels.normalization import _channel_kernels as shared
from udlkernels.normalization._row_kernels import sum_partials

# Columns of a program, and the rows whose gradients it sums: constants, so that the order of every
# sum depends on the sample's own extent alone.
BLOCK = 1024
CHUNK_ROWS = 16


@triton.jit
def _adaptive_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, rows_per_sample, n_cols,
    EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // rows_per_sample
    col = tl.arange(0, BLOCK_COLS)
    total = tl.zeros([BLOCK_COLS], ACC)
    largest = tl.zeros([BLOCK_COLS], ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + col < n_cols
        x = tl.load(x_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
        largest = tl.maximum(largest, tl.abs(x))
    top = tl.max(largest, 0)
    limit: tl.constexpr = 1e150 if ACC == tl.float64 else 1e15
    divisor = tl.where((top > limit) & (top < float("inf")), top, 1.0)
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + col < n_cols
        x = tl.load(x_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
        total += x / divisor
    mean = tl.sum(total, 0) / n_cols
    squares = tl.zeros([BLOCK_COLS], ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + col < n_cols
        x = tl.load(x_ptr + row * n_cols + start + col, mask=mask, other=0.0).to(ACC)
        x = tl.where(mask, x / divisor - mean, 0.0)
        squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / n_cols + EPS / divisor / divisor)
    tl.store(mean_ptr + row, mean * divisor)
    tl.store(rstd_ptr + row, rstd / divisor)
    for start in range(0, n_cols, BLOCK_COLS):
        at = start + col
        mask = at < n_cols
        x = tl.load(x_ptr + row * n_cols + at, mask=mask, other=0.0).to(ACC)
        scale = tl.load(scale_ptr + sample * n_cols + at, mask=mask, other=0.0).to(ACC)
        shift = tl.load(shift_ptr + sample * n_cols + at, mask=mask, other=0.0).to(ACC)
        y = (x / divisor - mean) * rstd * (1.0 + scale) + shift
        tl.store(y_ptr + row * n_cols + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adaptive_dx_kernel(
    dy_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, rows_per_sample, n_cols,
    ACC: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // rows_per_sample
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    g_sum = tl.zeros([BLOCK_COLS], ACC)
    h_sum = tl.zeros([BLOCK_COLS], ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        at = start + tl.arange(0, BLOCK_COLS)
        mask = at < n_cols
        dy = tl.load(dy_ptr + row * n_cols + at, mask=mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + row * n_cols + at, mask=mask, other=0.0).to(ACC)
        scale = tl.load(scale_ptr + sample * n_cols + at, mask=mask, other=0.0).to(ACC)
        g = dy * (1.0 + scale)
        g_sum += g
        h_sum += g * tl.where(mask, (x - mean) * rstd, 0.0)
    g_mean = tl.sum(g_sum, 0) / n_cols
    h_mean = tl.sum(h_sum, 0) / n_cols
    for start in range(0, n_cols, BLOCK_COLS):
        at = start + tl.arange(0, BLOCK_COLS)
        mask = at < n_cols
        dy = tl.load(dy_ptr + row * n_cols + at, mask=mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + row * n_cols + at, mask=mask, other=0.0).to(ACC)
        scale = tl.load(scale_ptr + sample * n_cols + at, mask=mask, other=0.0).to(ACC)
        dx = (dy * (1.0 + scale) - g_mean - (x - mean) * rstd * h_mean) * rstd
        tl.store(dx_ptr + row * n_cols + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adaptive_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, scales_ptr, shifts_ptr, rows_per_sample, n_cols,
    CHUNK: tl.constexpr, ACC: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Sums of dy * x_hat and dy over one chunk of one sample, [chunks, samples, n_cols]."""
    at = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    chunk = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    mask = at < n_cols
    scales = tl.zeros([BLOCK_COLS], ACC)
    shifts = tl.zeros([BLOCK_COLS], ACC)
    last = tl.minimum((chunk + 1) * CHUNK, rows_per_sample)
    for place in range(chunk * CHUNK, last):
        row = sample * rows_per_sample + place
        dy = tl.load(dy_ptr + row * n_cols + at, mask=mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + row * n_cols + at, mask=mask, other=0.0).to(ACC)
        scales += dy * (x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
        shifts += dy
    line = (chunk * tl.num_programs(2) + sample) * n_cols + at
    tl.store(scales_ptr + line, scales, mask=mask)
    tl.store(shifts_ptr + line, shifts, mask=mask)


def adaptive_layer_norm_fwd(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    n = x.shape[-1]
    count = x.numel() // n
    y, stats = x.new_empty(x.shape), x.new_empty((2, count), dtype=shared.acc_dtype(x))
    _adaptive_fwd_kernel[(count,)](
        x.contiguous(), scale.contiguous(), shift.contiguous(), y, stats[0], stats[1],
        count // x.shape[0], n, EPS=eps, ACC=shared.acc(x), BLOCK_COLS=shared.blocks(n, BLOCK),
    )  # fmt: skip
    return y, stats


def adaptive_layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    stats: torch.Tensor,
    need_dx: bool,
    need_dscale: bool,
    need_dshift: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = x.shape[-1]
    count, samples = x.numel() // n, x.shape[0]
    rows = count // samples
    dy, x = dy.contiguous(), x.contiguous()
    none = x.new_empty((0,), dtype=torch.float32)
    block = shared.blocks(n, BLOCK)
    dx = x.new_empty(x.shape) if need_dx else none
    if need_dx:
        _adaptive_dx_kernel[(count,)](
            dy, x, scale.contiguous(), stats[0], stats[1], dx, rows, n,
            ACC=shared.acc(x), BLOCK_COLS=block,
        )  # fmt: skip
    if not (need_dscale or need_dshift):
        return dx, none, none
    chunks = triton.cdiv(rows, CHUNK_ROWS)
    sums = x.new_empty((2, chunks, samples * n), dtype=shared.acc_dtype(x))
    _adaptive_sums_kernel[(triton.cdiv(n, block), chunks, samples)](
        dy, x, stats[0], stats[1], sums[0], sums[1], rows, n,
        CHUNK=CHUNK_ROWS, ACC=shared.acc(x), BLOCK_COLS=block,
    )  # fmt: skip
    dscale = sum_partials(sums[0], scale) if need_dscale else none
    return dx, dscale, sum_partials(sums[1], shift) if need_dshift else none


_WIDE = ("mean_ptr", "rstd_ptr", "scales_ptr", "shifts_ptr")
AOT = tuple(
    shared.entry(
        f"adaptive_layer_norm {name}", fn, dtype,
        dict(EPS=1e-5, CHUNK=CHUNK_ROWS, ACC=tl.float32, BLOCK_COLS=BLOCK),
        wide=_WIDE, aligned=("n_cols",),
    )
    for name, fn in (
        ("fwd", _adaptive_fwd_kernel), ("dx", _adaptive_dx_kernel), ("sums", _adaptive_sums_kernel)
    )
    for dtype in ("bf16", "fp32")
)  # fmt: skip
