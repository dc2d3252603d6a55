"""The Triton kernels of act_norm, and their launches.

Traffic per element: forward reads x and writes y; backward reads dy and x and writes dx, plus a
pair of float32 sums for every channel of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels.normalization import _channel_kernels as shared
from udlkernels.normalization._channels import empty_channels
from udlkernels.normalization._row_kernels import sum_partials


@triton.jit
def _act_norm_kernel(
    x_ptr, dy_ptr, log_scale_ptr, bias_ptr, out_ptr, products_ptr, sums_ptr, x_batch, x_channel,
    x_position, dy_batch, dy_channel, dy_position, out_batch, out_channel, out_position,
    n_channels, n_positions, BACKWARD: tl.constexpr, DX: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(x + bias) exp(log_scale) of one tile, or with BACKWARD dx and the tile's sums a channel."""
    sample = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    p = (tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    mask = (c < n_channels)[:, None] & (p < n_positions)
    scale = tl.exp(tl.load(log_scale_ptr + c, mask=c < n_channels, other=0.0).to(ACC))[:, None]
    bias = tl.load(bias_ptr + c, mask=c < n_channels, other=0.0).to(ACC)[:, None]
    x_at = x_ptr + sample * x_batch + c[:, None] * x_channel + p * x_position
    moved = tl.load(x_at, mask=mask, other=0.0).to(ACC) + bias
    out = moved * scale
    if BACKWARD:
        dy_at = dy_ptr + sample * dy_batch + c[:, None] * dy_channel + p * dy_position
        g = tl.load(dy_at, mask=mask, other=0.0).to(ACC) * scale
        line = (sample * tl.num_programs(0) + tl.program_id(0)) * n_channels + c
        tl.store(products_ptr + line, tl.sum(g * moved, 1), mask=c < n_channels)
        tl.store(sums_ptr + line, tl.sum(g, 1), mask=c < n_channels)
        out = g
    if DX:
        out_at = out_ptr + sample * out_batch + c[:, None] * out_channel + p * out_position
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def _views(x: torch.Tensor, *others: torch.Tensor) -> list[shared.Walk]:
    """All tensors walked alike; without positions the samples stand for them."""
    first = shared.walk(x)
    rest = [shared.walk(t, first.last and first.positions > 1) for t in others]
    if first.positions > 1:
        return [first, *rest]
    return [
        shared.Walk(w.data, True, 1, w.channels, w.batch, (0, w.strides[1], w.strides[0]))
        for w in (first, *rest)
    ]


def _grid(view: shared.Walk) -> tuple[int, int, int]:
    tile = view.tile
    blocks = triton.cdiv(view.positions, tile.positions), triton.cdiv(view.channels, tile.channels)
    return *blocks, view.batch


def act_norm_fwd(
    x: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    y = empty_channels(x)
    view, out = _views(x, y)
    _act_norm_kernel[_grid(view)](
        view.data, view.data, log_scale.contiguous(), bias.contiguous(), y, y, y,
        *view.strides, *view.strides, *out.strides, view.channels, view.positions,
        BACKWARD=False, DX=True, ACC=shared.acc(x), BLOCK_C=view.tile.channels,
        BLOCK_P=view.tile.positions, num_warps=view.tile.num_warps,
    )  # fmt: skip
    logdet = log_scale.to(torch.float64).sum() * _positions(x)
    return y, logdet.to(shared.acc_dtype(x)).repeat(x.shape[0])


def act_norm_bwd(
    dy: torch.Tensor,
    dlogdet: torch.Tensor,
    x: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    need_dx: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = empty_channels(x)
    view, dy_view, out = _views(x, dy, dx)
    grid = _grid(view)
    sums = x.new_empty((2, grid[0] * view.batch, view.channels), dtype=shared.acc_dtype(x))
    _act_norm_kernel[grid](
        view.data, dy_view.data, log_scale.contiguous(), bias.contiguous(), dx, sums[0], sums[1],
        *view.strides, *dy_view.strides, *out.strides, view.channels, view.positions,
        BACKWARD=True, DX=need_dx, ACC=shared.acc(x), BLOCK_C=view.tile.channels,
        BLOCK_P=view.tile.positions, num_warps=view.tile.num_warps,
    )  # fmt: skip
    wide = torch.empty_like(log_scale, dtype=shared.acc_dtype(x))
    dlog_scale = sum_partials(sums[0], wide) + dlogdet.to(torch.float64).sum() * _positions(x)
    none = x.new_empty((0,), dtype=torch.float32)
    return dx if need_dx else none, dlog_scale.to(log_scale.dtype), sum_partials(sums[1], bias)


def _positions(x: torch.Tensor) -> int:
    return x.numel() // (x.shape[0] * x.shape[1])


AOT = tuple(
    shared.entry(
        f"act_norm {'bwd' if backward else 'fwd'} {layout}", _act_norm_kernel, dtype,
        {"BACKWARD": backward, "DX": True, "ACC": tl.float32, "BLOCK_C": tile.channels,
         "BLOCK_P": tile.positions,
         **{f"{name}_{'channel' if last else 'position'}": 1 for name in ("x", "dy", "out")}},
        wide=("products_ptr", "sums_ptr"),
        aligned=(
            *(a for a in _act_norm_kernel.arg_names if a.endswith("_batch")),
            *(f"{name}_{'position' if last else 'channel'}" for name in ("x", "dy", "out")),
            "n_channels" if last else "n_positions",
        ),
    )
    for layout, tile, last in (("planes", shared.PLANES, False), ("last", shared.LAST, True))
    for backward in (False, True)
    for dtype in ("bf16", "fp32")
)  # fmt: skip
