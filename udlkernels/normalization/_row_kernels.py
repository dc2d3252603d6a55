"""The Triton kernels behind layer_norm (CENTER) and rms_norm, and their launches.

Traffic per element: forward reads x and writes y; backward reads dy and x and writes dx, plus two
float32 lines of partial sums for every CHUNK_ROWS rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry
from udlkernels._philox import threshold


@dataclass(frozen=True)
class Launch:
    """Tile of one program; wider rows than `cols` are walked in pieces."""

    rows: int
    cols: int
    num_warps: int


# (widest row, tile). A row stays in registers up to 8192 columns at 8 warps: 32 elements a thread.
# 8 elements a thread is the least that compiles to 128-bit loads, so narrow rows share a program.
# Sizes follow from compiled code (registers, spills, vector width), not from timings on a GPU.
FORWARD = [
    (64, Launch(16, 64, 4)),
    (128, Launch(8, 128, 4)),
    (256, Launch(4, 256, 4)),
    (512, Launch(2, 512, 4)),
    (1024, Launch(1, 1024, 4)),
    (2048, Launch(1, 2048, 4)),
    (4096, Launch(1, 4096, 8)),
    (8192, Launch(1, 8192, 8)),
    (None, Launch(1, 4096, 8)),
]
# The backward holds dy, x and the two running sums: half the columns in registers.
BACKWARD = [
    (64, Launch(16, 64, 4)),
    (128, Launch(8, 128, 4)),
    (256, Launch(4, 256, 4)),
    (512, Launch(2, 512, 4)),
    (1024, Launch(1, 1024, 4)),
    (2048, Launch(1, 2048, 8)),
    (4096, Launch(1, 4096, 8)),
    (None, Launch(1, 2048, 8)),
]
# Rows whose weight gradients one program sums: a constant, so that the order of the sum depends on
# nothing but the number of rows. 16 rows give 256 programs at 4096 rows, and 8% more traffic.
CHUNK_ROWS = 16


def pick(table: list[tuple[int | None, Launch]], n: int) -> Launch:
    return next(launch for limit, launch in table if limit is None or n <= limit)


@triton.jit
def dropout_keeps(seed_ptr, row, group, THRESHOLD: tl.constexpr):
    """Which elements stay, [R, 4 * G]: four columns a group; row [R, 1], group [1, G]."""
    zero = (row * 0 + group * 0).to(tl.uint32)
    c0 = zero + group.to(tl.uint32)
    c1 = zero + row.to(tl.uint32)
    c2 = zero + (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words.to(tl.int64) >= THRESHOLD


@triton.jit
def _read_first(
    x_ptr, residual_ptr, s_ptr, seed_ptr, x_row, residual_row, s_row, row, first_col, at, mask,
    ACC: tl.constexpr, RESIDUAL: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A tile of what is normalised: x, or s = residual + dropout(x), which is stored."""
    x = tl.load(x_ptr + (x_row[:, None] + at), mask=mask, other=0.0)
    if RESIDUAL:
        if THRESHOLD > 0:
            group = first_col // 4 + tl.arange(0, BLOCK_COLS // 4)[None, :]
            keep = dropout_keeps(seed_ptr, row[:, None], group, THRESHOLD)
            x = tl.where(keep, x.to(ACC) * SCALE, 0.0).to(x.dtype)
        residual = tl.load(residual_ptr + (residual_row[:, None] + at), mask=mask, other=0.0)
        x = (residual.to(ACC) + x.to(ACC)).to(x.dtype)
        tl.store(s_ptr + (s_row[:, None] + at), x, mask=mask)
    return x.to(ACC)


@triton.jit
def _safe_divisor(largest, ACC: tl.constexpr):
    """What to divide a row by so that its squares cannot overflow: 1 for all but huge rows."""
    limit = 1e150 if ACC == tl.float64 else 1e15
    return tl.where((largest > limit) & (largest < float("inf")), largest, 1.0)


@triton.jit
def row_norm_fwd_kernel(
    x_ptr, residual_ptr, s_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, seed_ptr,
    x_stride, residual_stride, n_rows, n_cols,
    EPS: tl.constexpr, WEIGHT_OFFSET: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, CAST_BEFORE: tl.constexpr,
    LOOP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    row_mask = row < n_rows
    col = tl.arange(0, BLOCK_COLS)
    x_row, residual_row, y_row = row * x_stride, row * residual_stride, row * n_cols
    mean = tl.zeros([BLOCK_ROWS], ACC)

    if LOOP:
        # The first pass leaves s in memory; the others read x or s, which the L2 cache holds.
        largest = tl.zeros([BLOCK_ROWS], ACC)
        for start in range(0, n_cols, BLOCK_COLS):
            at = start + col
            mask = row_mask[:, None] & (at < n_cols)[None, :]
            x = _read_first(
                x_ptr, residual_ptr, s_ptr, seed_ptr, x_row, residual_row, y_row, row, start, at,
                mask, ACC, RESIDUAL, THRESHOLD, SCALE, BLOCK_COLS,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        divisor = _safe_divisor(largest, ACC)
        in_ptr = s_ptr if RESIDUAL else x_ptr
        in_row = y_row if RESIDUAL else x_row
        if CENTER:
            total = tl.zeros([BLOCK_ROWS], ACC)
            for start in range(0, n_cols, BLOCK_COLS):
                at = start + col
                mask = row_mask[:, None] & (at < n_cols)[None, :]
                x = tl.load(in_ptr + (in_row[:, None] + at), mask=mask, other=0.0).to(ACC)
                total += tl.sum(x / divisor[:, None], 1)
            mean = total / n_cols
        squares = tl.zeros([BLOCK_ROWS], ACC)
        for start in range(0, n_cols, BLOCK_COLS):
            at = start + col
            mask = row_mask[:, None] & (at < n_cols)[None, :]
            x = tl.load(in_ptr + (in_row[:, None] + at), mask=mask, other=0.0).to(ACC)
            x = tl.where(mask, x / divisor[:, None] - mean[:, None], 0.0)
            squares += tl.sum(x * x, 1)
    else:
        mask = row_mask[:, None] & (col < n_cols)[None, :]
        x = _read_first(
            x_ptr, residual_ptr, s_ptr, seed_ptr, x_row, residual_row, y_row, row, 0, col, mask,
            ACC, RESIDUAL, THRESHOLD, SCALE, BLOCK_COLS,
        )  # fmt: skip
        divisor = _safe_divisor(tl.max(tl.abs(x), 1), ACC)
        x = x / divisor[:, None]
        if CENTER:
            mean = tl.sum(x, 1) / n_cols
            x = tl.where(mask, x - mean[:, None], 0.0)
        squares = tl.sum(x * x, 1)

    rstd = 1.0 / tl.sqrt(squares / n_cols + EPS / divisor / divisor)
    if CENTER:
        tl.store(mean_ptr + row, mean * divisor, mask=row_mask)
    tl.store(rstd_ptr + row, rstd / divisor, mask=row_mask)

    for start in range(0, n_cols if LOOP else 1, BLOCK_COLS):
        at = start + col
        mask = row_mask[:, None] & (at < n_cols)[None, :]
        if LOOP:
            x = tl.load(in_ptr + (in_row[:, None] + at), mask=mask, other=0.0).to(ACC)
            x = x / divisor[:, None] - mean[:, None]
        y = x * rstd[:, None]
        if CAST_BEFORE:
            y = y.to(y_ptr.dtype.element_ty).to(ACC)
        if WEIGHT:
            weight = tl.load(weight_ptr + at, mask=at < n_cols, other=0.0).to(ACC)
            y = y * (weight + WEIGHT_OFFSET)[None, :]
        if BIAS:
            y = y + tl.load(bias_ptr + at, mask=at < n_cols, other=0.0).to(ACC)[None, :]
        tl.store(y_ptr + (y_row[:, None] + at), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_tile(
    dy_ptr, x_ptr, weight_ptr, row, at, n_cols, mask, dy_stride, x_stride, mean, rstd,
    WEIGHT_OFFSET: tl.constexpr, ACC: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """dy, g = dy * weight and x_hat of one tile, zero outside."""
    dy = tl.load(dy_ptr + (row * dy_stride)[:, None] + at, mask=mask, other=0.0).to(ACC)
    x = tl.load(x_ptr + (row * x_stride)[:, None] + at, mask=mask, other=0.0).to(ACC)
    x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    g = dy
    if WEIGHT:
        weight = tl.load(weight_ptr + at, mask=at < n_cols, other=0.0).to(ACC)
        g = dy * (weight + WEIGHT_OFFSET)[None, :]
    return dy, g, x_hat


@triton.jit
def row_means_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, dy_stride, x_stride, n_rows, n_cols,
    WEIGHT_OFFSET: tl.constexpr, ACC: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """For rows too wide for the registers: the means of g and of g * x_hat, [2, n_rows]."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + row)
    mean = tl.load(mean_ptr + row) if CENTER else tl.zeros([1], ACC)
    g_sum = tl.zeros([1], ACC)
    h_sum = tl.zeros([1], ACC)
    for start in range(0, n_cols, BLOCK_COLS):
        at = start + tl.arange(0, BLOCK_COLS)
        mask = (at < n_cols)[None, :]
        _, g, x_hat = _gradient_tile(
            dy_ptr, x_ptr, weight_ptr, row, at, n_cols, mask, dy_stride, x_stride, mean, rstd,
            WEIGHT_OFFSET, ACC, WEIGHT,
        )  # fmt: skip
        g_sum += tl.sum(g, 1)
        h_sum += tl.sum(g * x_hat, 1)
    tl.store(means_ptr + row, g_sum / n_cols)
    tl.store(means_ptr + n_rows + row, h_sum / n_cols)


@triton.jit
def row_norm_bwd_kernel(
    dy_ptr, ds_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, seed_ptr, dx_ptr, dropped_ptr,
    dweight_ptr, dbias_ptr, dy_stride, ds_stride, x_stride, n_rows, n_cols,
    WEIGHT_OFFSET: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, CENTER: tl.constexpr, WEIGHT: tl.constexpr, DX: tl.constexpr,
    DS: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
    LOOP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of CHUNK rows and, with LOOP, of one block of columns."""
    chunk = tl.program_id(0).to(tl.int64)
    first_col = tl.program_id(1) * BLOCK_COLS
    at = first_col + tl.arange(0, BLOCK_COLS)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    for step in range(0, CHUNK, BLOCK_ROWS):
        row = chunk * CHUNK + step + tl.arange(0, BLOCK_ROWS)
        row_mask = row < n_rows
        mask = row_mask[:, None] & (at < n_cols)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        mean = tl.zeros([BLOCK_ROWS], ACC)
        if CENTER:
            mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        dy, g, x_hat = _gradient_tile(
            dy_ptr, x_ptr, weight_ptr, row, at, n_cols, mask, dy_stride, x_stride, mean, rstd,
            WEIGHT_OFFSET, ACC, WEIGHT,
        )  # fmt: skip
        if DWEIGHT:
            dweight += dy * x_hat
        if DBIAS:
            dbias += dy
        if DX:
            if LOOP:
                g_mean = tl.load(means_ptr + row, mask=row_mask, other=0.0)
                h_mean = tl.load(means_ptr + n_rows + row, mask=row_mask, other=0.0)
            else:
                g_mean = tl.sum(g, 1) / n_cols
                h_mean = tl.sum(g * x_hat, 1) / n_cols
            if CENTER:
                g -= g_mean[:, None]
            dx = (g - x_hat * h_mean[:, None]) * rstd[:, None]
            if DS:
                ds_at = (row * ds_stride)[:, None] + at
                dx += tl.load(ds_ptr + ds_at, mask=mask, other=0.0).to(ACC)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + (row * n_cols)[:, None] + at, dx, mask=mask)
            if THRESHOLD > 0:
                group = first_col // 4 + tl.arange(0, BLOCK_COLS // 4)[None, :]
                keep = dropout_keeps(seed_ptr, row[:, None], group, THRESHOLD)
                dropped = tl.where(keep, dx.to(ACC) * SCALE, 0.0).to(dx_ptr.dtype.element_ty)
                tl.store(dropped_ptr + (row * n_cols)[:, None] + at, dropped, mask=mask)
    if DWEIGHT:
        tl.store(dweight_ptr + chunk * n_cols + at, tl.sum(dweight, 0), mask=at < n_cols)
    if DBIAS:
        tl.store(dbias_ptr + chunk * n_cols + at, tl.sum(dbias, 0), mask=at < n_cols)


@triton.jit
def sum_partials_kernel(
    partials_ptr, out_ptr, count, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """out[j] = sum over i of partials[i, j]: lanes of BLOCK_ROWS rows, then across the lanes."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], partials_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (row < count)[:, None] & (col < width)[None, :]
        total += tl.load(partials_ptr + row[:, None] * width + col, mask=mask, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=col < width)


def _acc(x: torch.Tensor) -> tuple[torch.dtype, Any]:
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def _rows(x: torch.Tensor, n: int) -> torch.Tensor:
    """x as [rows, n] with contiguous rows; a copy only where the layout has no such form."""
    try:
        rows = x.view(-1, n)
    except RuntimeError:
        rows = x.reshape(-1, n)
    return rows if rows.stride(1) == 1 or n == 1 else rows.contiguous()


def _dropout(p: float, seed: torch.Tensor | None) -> dict[str, Any]:
    if seed is None or p <= 0.0:
        return {"THRESHOLD": 0, "SCALE": 1.0}
    return {"THRESHOLD": threshold(p), "SCALE": 1.0 / (1.0 - p) if p < 1.0 else 0.0}


def launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    eps: float,
    *,
    center: bool,
    weight_offset: float = 0.0,
    cast_before: bool = False,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """y, s (None without a residual) and the statistics: [2, rows] when centred, else [rows]."""
    rows = _rows(x, n)
    count = rows.shape[0]
    stats = x.new_empty((2, count) if center else (count,), dtype=_acc(x)[0])
    y = x.new_empty(x.shape)
    s = None if residual is None else x.new_empty(x.shape)
    residual_rows = rows if residual is None else _rows(residual, n)
    tile = pick(FORWARD, n)
    row_norm_fwd_kernel[(triton.cdiv(count, tile.rows),)](
        rows, residual_rows, y if s is None else s, _or(weight, y), _or(bias, y), y,
        stats, stats[1] if center else stats, _or(seed, y),
        rows.stride(0), residual_rows.stride(0), count, n,
        EPS=eps, WEIGHT_OFFSET=weight_offset, **_dropout(dropout_p, seed),
        ACC=_acc(x)[1], CENTER=center, WEIGHT=weight is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, CAST_BEFORE=cast_before and weight is not None,
        LOOP=n > tile.cols, BLOCK_ROWS=tile.rows, BLOCK_COLS=tile.cols, num_warps=tile.num_warps,
    )  # fmt: skip
    return y, s, stats


def launch_backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    n: int,
    *,
    center: bool,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    need_dx: bool = True,
    dweight_like: torch.Tensor | None = None,
    dbias_like: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx (the gradient to what was normalised), dx through the dropout, dweight, dbias.

    What is not wanted comes back without elements.
    """
    dy_rows, x_rows = _rows(dy, n), _rows(x, n)
    ds_rows = dy_rows if ds is None else _rows(ds, n)
    count = x_rows.shape[0]
    acc_dtype, acc = _acc(x)
    none = x.new_empty((0,), dtype=torch.float32)
    tile = pick(BACKWARD, n)
    loop = n > tile.cols
    chunks = triton.cdiv(count, CHUNK_ROWS)
    mean, rstd = (stats[0], stats[1]) if center else (stats, stats)
    means = stats
    if loop and need_dx:
        means = x.new_empty((2, count), dtype=acc_dtype)
        row_means_kernel[(count,)](
            dy_rows, x_rows, _or(weight, x), mean, rstd, means,
            dy_rows.stride(0), x_rows.stride(0), count, n,
            WEIGHT_OFFSET=weight_offset, ACC=acc, CENTER=center, WEIGHT=weight is not None,
            BLOCK_COLS=tile.cols, num_warps=tile.num_warps,
        )  # fmt: skip
    dx = x.new_empty(x.shape) if need_dx else none
    dropped = x.new_empty(x.shape) if need_dx and seed is not None else none
    partials = [
        None if like is None else x.new_empty((chunks, n), dtype=acc_dtype)
        for like in (dweight_like, dbias_like)
    ]
    row_norm_bwd_kernel[(chunks, triton.cdiv(n, tile.cols))](
        dy_rows, ds_rows, x_rows, _or(weight, x), mean, rstd, means, _or(seed, x),
        dx if need_dx else x, dropped if seed is not None else x,
        _or(partials[0], x), _or(partials[1], x),
        dy_rows.stride(0), ds_rows.stride(0), x_rows.stride(0), count, n,
        WEIGHT_OFFSET=weight_offset, **_dropout(dropout_p, seed), ACC=acc, CENTER=center,
        WEIGHT=weight is not None, DX=need_dx, DS=ds is not None, DWEIGHT=dweight_like is not None,
        DBIAS=dbias_like is not None, LOOP=loop, CHUNK=CHUNK_ROWS, BLOCK_ROWS=tile.rows,
        BLOCK_COLS=tile.cols, num_warps=tile.num_warps,
    )  # fmt: skip
    sums = [
        none if partial is None or like is None else sum_partials(partial, like)
        for partial, like in zip(partials, (dweight_like, dbias_like), strict=True)
    ]
    return dx, dropped, sums[0], sums[1]


def sum_partials(partials: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Column sums of [count, width] in a fixed order, shaped and typed as `like`."""
    count, width = partials.shape
    out = like.new_empty(like.shape)
    sum_partials_kernel[(triton.cdiv(width, 64),)](
        partials, out, count, width, BLOCK_ROWS=32, BLOCK_COLS=64, num_warps=4
    )
    return out


def _or(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A pointer argument that the kernel will not read still has to be some tensor."""
    return placeholder if tensor is None else tensor


def entries(op: str, center: bool) -> tuple[Entry, ...]:
    """What a launch of `op` can ask the compiler for: every tile in bfloat16, the largest in
    float32 too, and the fused form with dropout."""
    found = []
    for limit, tile in FORWARD:
        for dtype in ("bf16", "fp32") if limit in (8192, None) else ("bf16",):
            found.append(_forward_entry(f"{op}_fwd", dtype, limit, tile, center, False))
            if limit in (1024, 8192):
                found.append(_forward_entry(f"add_{op}_fwd", dtype, limit, tile, center, True))
    for limit, tile in BACKWARD:
        for dtype in ("bf16", "fp32") if limit in (4096, None) else ("bf16",):
            found.append(_backward_entry(f"{op}_bwd", dtype, limit, tile, center, False))
            if limit in (1024, 4096):
                found.append(_backward_entry(f"add_{op}_bwd", dtype, limit, tile, center, True))
    wide = BACKWARD[-1][1]
    found.append(
        Entry(
            f"{op}_bwd means bf16",
            row_means_kernel,
            _signature(row_means_kernel, "bf16"),
            dict(
                WEIGHT_OFFSET=0.0, ACC=tl.float32, CENTER=center, WEIGHT=True, BLOCK_COLS=wide.cols
            ),
            _divisible(row_means_kernel),
            wide.num_warps,
        )
    )
    found.append(
        Entry(
            f"{op}_bwd sum of partials",
            sum_partials_kernel,
            {"partials_ptr": "*fp32", "out_ptr": "*bf16", "count": "i32", "width": "i32"},
            dict(BLOCK_ROWS=32, BLOCK_COLS=64),
            ("partials_ptr", "out_ptr", "width"),
        )
    )
    return tuple(found)


_FLOAT32 = ("mean_ptr", "rstd_ptr", "means_ptr", "dweight_ptr", "dbias_ptr")


def _signature(fn: Any, dtype: str) -> dict[str, str]:
    """Types of the arguments of a row kernel, told by their names."""
    types = {}
    for name in fn.arg_names:
        if name == "seed_ptr":
            types[name] = "*i64"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name in _FLOAT32 else f"*{dtype}"
        elif not name.isupper():
            types[name] = "i32"
    return types


def _divisible(fn: Any) -> tuple[str, ...]:
    return tuple(n for n in fn.arg_names if n.endswith(("_ptr", "_stride")) or n == "n_cols")


def _forward_entry(
    name: str, dtype: str, limit: int | None, tile: Launch, center: bool, fused: bool
) -> Entry:
    constexprs = dict(
        EPS=1e-5, WEIGHT_OFFSET=0.0, THRESHOLD=threshold(0.1) if fused else 0, SCALE=1.0 / 0.9,
        ACC=tl.float32, CENTER=center, WEIGHT=True, BIAS=center, RESIDUAL=fused, CAST_BEFORE=False,
        LOOP=limit is None, BLOCK_ROWS=tile.rows, BLOCK_COLS=tile.cols,
    )  # fmt: skip
    fn = row_norm_fwd_kernel
    label = f"{name} {dtype} {limit or 'wider'}"
    return Entry(label, fn, _signature(fn, dtype), constexprs, _divisible(fn), tile.num_warps)


def _backward_entry(
    name: str, dtype: str, limit: int | None, tile: Launch, center: bool, fused: bool
) -> Entry:
    constexprs = dict(
        WEIGHT_OFFSET=0.0, THRESHOLD=threshold(0.1) if fused else 0, SCALE=1.0 / 0.9,
        ACC=tl.float32, CENTER=center, WEIGHT=True, DX=True, DS=fused, DWEIGHT=True, DBIAS=center,
        LOOP=limit is None, CHUNK=CHUNK_ROWS, BLOCK_ROWS=tile.rows, BLOCK_COLS=tile.cols,
    )  # fmt: skip
    fn = row_norm_bwd_kernel
    label = f"{name} {dtype} {limit or 'wider'}"
    return Entry(label, fn, _signature(fn, dtype), constexprs, _divisible(fn), tile.num_warps)
