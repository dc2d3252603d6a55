"""The Triton kernels of local_response_norm, and their launches.

Traffic per element: forward reads x and writes y (the window's other channels come from the
caches); backward reads dy and x twice, writes and reads the float32 products q, and writes dx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels.normalization import _channel_kernels as shared
from udlkernels.normalization._channels import empty_channels


@triton.jit
def _power(s, BETA: tl.constexpr):
    """s^-BETA."""
    if BETA == 0.75:
        r = 1.0 / tl.sqrt(s)
        power = r * tl.sqrt(r)
    elif BETA == 0.5:
        power = 1.0 / tl.sqrt(s)
    elif BETA == 1.0:
        power = 1.0 / s
    else:
        power = tl.exp2(-BETA * tl.log2(s))
    return power


@triton.jit
def _window(
    ptr, c, inside, n_channels, channel_stride, FIRST: tl.constexpr, SIZE: tl.constexpr,
    SQUARE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum over SIZE channels from c + FIRST on of what ptr holds for channel 0, or its squares."""
    total = tl.zeros(inside.shape, ACC)
    for tap in range(SIZE):
        at = c + (FIRST + tap)
        mask = inside & (at >= 0) & (at < n_channels)
        value = tl.load(ptr + at * channel_stride, mask=mask, other=0.0).to(ACC)
        total += value * value if SQUARE else value
    return total


@triton.jit
def _place(n_channels, n_positions, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """This program's sample, channels [BLOCK_C, 1], positions [1, BLOCK_P] and mask."""
    sample = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
    p = (tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    return sample, c, p, (c < n_channels) & (p < n_positions)


@triton.jit
def _lrn_fwd_kernel(
    x_ptr, y_ptr, x_batch, x_channel, x_position, y_batch, y_channel, y_position,
    n_channels, n_positions, SCALE: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    BEFORE: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, c, p, inside = _place(n_channels, n_positions, BLOCK_C, BLOCK_P)
    x_at = x_ptr + sample * x_batch + p * x_position
    s = K + SCALE * _window(x_at, c, inside, n_channels, x_channel, -BEFORE, SIZE, True, ACC)
    x = tl.load(x_at + c * x_channel, mask=inside, other=0.0).to(ACC)
    y_at = y_ptr + sample * y_batch + c * y_channel + p * y_position
    tl.store(y_at, (x * _power(s, BETA)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lrn_products_kernel(
    dy_ptr, x_ptr, q_ptr, dy_batch, dy_channel, dy_position, x_batch, x_channel, x_position,
    q_batch, q_channel, q_position, n_channels, n_positions,
    SCALE: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr,
    SIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """q = dy x s^(-beta - 1)."""
    sample, c, p, inside = _place(n_channels, n_positions, BLOCK_C, BLOCK_P)
    x_at = x_ptr + sample * x_batch + p * x_position
    s = K + SCALE * _window(x_at, c, inside, n_channels, x_channel, -BEFORE, SIZE, True, ACC)
    x = tl.load(x_at + c * x_channel, mask=inside, other=0.0).to(ACC)
    dy_at = dy_ptr + sample * dy_batch + c * dy_channel + p * dy_position
    dy = tl.load(dy_at, mask=inside, other=0.0).to(ACC)
    q_at = q_ptr + sample * q_batch + c * q_channel + p * q_position
    tl.store(q_at, dy * _power(s, BETA) * x / s, mask=inside)


@triton.jit
def _lrn_bwd_kernel(
    dy_ptr, x_ptr, q_ptr, dx_ptr, dy_batch, dy_channel, dy_position, x_batch, x_channel,
    x_position, q_batch, q_channel, q_position, n_channels, n_positions,
    SCALE: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr,
    SIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx; q and dx have the same strides."""
    sample, c, p, inside = _place(n_channels, n_positions, BLOCK_C, BLOCK_P)
    x_at = x_ptr + sample * x_batch + p * x_position
    s = K + SCALE * _window(x_at, c, inside, n_channels, x_channel, -BEFORE, SIZE, True, ACC)
    q_at = q_ptr + sample * q_batch + p * q_position
    first: tl.constexpr = BEFORE + 1 - SIZE
    products = _window(q_at, c, inside, n_channels, q_channel, first, SIZE, False, ACC)
    x = tl.load(x_at + c * x_channel, mask=inside, other=0.0).to(ACC)
    dy_at = dy_ptr + sample * dy_batch + c * dy_channel + p * dy_position
    dy = tl.load(dy_at, mask=inside, other=0.0).to(ACC)
    dx = dy * _power(s, BETA) - 2.0 * SCALE * BETA * x * products
    dx_at = dx_ptr + sample * q_batch + c * q_channel + p * q_position
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _grid(x: shared.Walk) -> tuple[int, int, int]:
    tile = x.tile
    return triton.cdiv(x.positions, tile.positions), triton.cdiv(x.channels, tile.channels), x.batch


def local_response_norm_fwd(
    x: torch.Tensor, size: int, alpha: float, beta: float, k: float
) -> torch.Tensor:
    view, y = shared.walk(x), empty_channels(x)
    out = shared.walk(y, view.last and view.positions > 1)
    _lrn_fwd_kernel[_grid(view)](
        view.data, y, *view.strides, *out.strides, view.channels, view.positions,
        SCALE=alpha / size, BETA=float(beta), K=k, BEFORE=size // 2, SIZE=size, ACC=shared.acc(x),
        BLOCK_C=view.tile.channels, BLOCK_P=view.tile.positions, num_warps=view.tile.num_warps,
    )  # fmt: skip
    return y


def local_response_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, size: int, alpha: float, beta: float, k: float
) -> torch.Tensor:
    view, dx = shared.walk(x), empty_channels(x)
    channels_last = view.last and view.positions > 1
    dy_view, out = shared.walk(dy, channels_last), shared.walk(dx, channels_last)
    q = torch.empty_like(dx, dtype=shared.acc_dtype(x))
    options = dict(
        SCALE=alpha / size, BETA=float(beta), K=k, BEFORE=size // 2, SIZE=size, ACC=shared.acc(x),
        BLOCK_C=view.tile.channels, BLOCK_P=view.tile.positions, num_warps=view.tile.num_warps,
    )  # fmt: skip
    strides = *dy_view.strides, *view.strides, *out.strides
    count = view.channels, view.positions
    grid = _grid(view)
    _lrn_products_kernel[grid](dy_view.data, view.data, q, *strides, *count, **options)
    _lrn_bwd_kernel[grid](dy_view.data, view.data, q, dx, *strides, *count, **options)
    return dx


_OPTIONS = dict(SCALE=2e-5, BETA=0.75, K=2.0, BEFORE=2, SIZE=5, ACC=tl.float32)
AOT = tuple(
    shared.entry(
        f"local_response_norm {name}", fn, dtype,
        {**_OPTIONS, "BLOCK_C": shared.PLANES.channels, "BLOCK_P": shared.PLANES.positions,
         "x_position": 1, "y_position": 1, "dy_position": 1, "q_position": 1},
        wide=("q_ptr",),
        aligned=(
            *(a for a in fn.arg_names if a.endswith(("_batch", "_channel"))),
            "n_positions",
        ),
    )
    for name, fn in (
        ("fwd", _lrn_fwd_kernel), ("products", _lrn_products_kernel), ("bwd", _lrn_bwd_kernel)
    )
    for dtype in ("bf16", "fp32")
)  # fmt: skip
