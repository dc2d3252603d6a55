"""The Triton kernels of pixel_norm, and their launches.

Traffic per element: forward reads x and writes y; backward reads dy and x and writes dx; the second
pass over a program's channels reads the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels.normalization import _channel_kernels as shared
from udlkernels.normalization._channels import empty_channels


@triton.jit
def _pixel_kernel(
    x_ptr, dy_ptr, out_ptr, rstd_ptr, x_batch, x_channel, x_position, dy_batch, dy_channel,
    dy_position, out_batch, out_channel, out_position, n_channels, n_positions,
    EPS: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x / rms over the channels of BLOCK_P positions, or with BACKWARD the gradient to x."""
    sample = tl.program_id(1).to(tl.int64)
    p = (tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    x_at = x_ptr + sample * x_batch + p * x_position
    dy_at = dy_ptr + sample * dy_batch + p * dy_position
    top = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for start in range(0, n_channels, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        mask = (c < n_channels) & (p < n_positions)
        x = tl.load(x_at + c * x_channel, mask=mask, other=0.0).to(ACC)
        top = tl.maximum(top, tl.abs(x))
    limit: tl.constexpr = 1e150 if ACC == tl.float64 else 1e15
    largest = tl.max(top, 0)[None, :]
    divisor = tl.where((largest > limit) & (largest < float("inf")), largest, 1.0)
    squares = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    products = tl.zeros([BLOCK_C, BLOCK_P], ACC)
    for start in range(0, n_channels, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        mask = (c < n_channels) & (p < n_positions)
        x = tl.load(x_at + c * x_channel, mask=mask, other=0.0).to(ACC) / divisor
        squares += x * x
        if BACKWARD:
            products += x * tl.load(dy_at + c * dy_channel, mask=mask, other=0.0).to(ACC)
    mean = tl.sum(squares, 0)[None, :] / n_channels
    rstd = 1.0 / tl.sqrt(mean + EPS / divisor / divisor)
    if KEEP:
        at = rstd_ptr + sample * n_positions + p
        tl.store(at, rstd / divisor, mask=p < n_positions)
    h_mean = tl.sum(products, 0)[None, :] * rstd / n_channels
    for start in range(0, n_channels, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        mask = (c < n_channels) & (p < n_positions)
        out = tl.load(x_at + c * x_channel, mask=mask, other=0.0).to(ACC) / divisor * rstd
        if BACKWARD:
            dy = tl.load(dy_at + c * dy_channel, mask=mask, other=0.0).to(ACC)
            out = (dy - out * h_mean) * (rstd / divisor)
        out_at = out_ptr + sample * out_batch + c * out_channel + p * out_position
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, dy: torch.Tensor | None, rstd: torch.Tensor | None, eps: float
) -> torch.Tensor:
    view, result = shared.walk(x), empty_channels(x)
    channels_last = view.last and view.positions > 1
    out = shared.walk(result, channels_last)
    other = view if dy is None else shared.walk(dy, channels_last)
    _pixel_kernel[(triton.cdiv(view.positions, view.tile.positions), view.batch)](
        view.data, other.data, result, result if rstd is None else rstd,
        *view.strides, *other.strides, *out.strides, view.channels, view.positions,
        EPS=eps, BACKWARD=dy is not None, KEEP=rstd is not None, ACC=shared.acc(x),
        BLOCK_C=view.tile.channels, BLOCK_P=view.tile.positions, num_warps=view.tile.num_warps,
    )  # fmt: skip
    return result


def pixel_norm_fwd(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    view = shared.walk(x)
    count = view.batch * view.positions if view.last else 0
    rstd = x.new_empty((count,), dtype=shared.acc_dtype(x))
    return _launch(x, None, rstd if view.last else None, eps), rstd


def pixel_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, eps: float
) -> torch.Tensor:
    return _launch(x, dy, None, eps)


AOT = tuple(
    shared.entry(
        f"pixel_norm {'bwd' if backward else 'fwd'} {layout}", _pixel_kernel, dtype,
        {"EPS": 1e-8, "BACKWARD": backward, "KEEP": keep and not backward, "ACC": tl.float32,
         "BLOCK_C": tile.channels, "BLOCK_P": tile.positions,
         **{f"{name}_{'channel' if keep else 'position'}": 1 for name in ("x", "dy", "out")}},
        wide=("rstd_ptr",),
        aligned=(
            *(a for a in _pixel_kernel.arg_names if a.endswith("_batch")),
            *(f"{name}_{'position' if keep else 'channel'}" for name in ("x", "dy", "out")),
            "n_channels" if keep else "n_positions",
        ),
    )
    for layout, tile, keep in (("planes", shared.PLANES, False), ("last", shared.LAST, True))
    for backward in (False, True)
    for dtype in ("bf16", "fp32")
)  # fmt: skip
