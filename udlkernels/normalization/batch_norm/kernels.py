"""The Triton kernels of batch_norm and batch_norm_act, and their launches.

Traffic per element: forward reads x twice (statistics, then result) and writes y; backward reads dy
and x twice and writes dx. Statistics are kept per chunk of a fixed number of values and merged in
float64 in the order of the chunks, so that they depend on nothing but the input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels.normalization import _channel_kernels as shared
from udlkernels.normalization._activation_kernels import activate, activate_grad
from udlkernels.normalization._channels import empty_channels, is_channels_last, positions_of
from udlkernels.normalization._row_kernels import sum_partials

# Values of each channel that one program sums, and the tile it walks them with: the contiguous
# dimension is the long one, 8 elements a thread for 128-bit loads of 16-bit types.
PLANES = dict(CHUNK=4096, BLOCK_M=1024, BLOCK_C=1)
LAST = dict(CHUNK=256, BLOCK_M=16, BLOCK_C=64)


@triton.jit
def _place(start, c, n_channels, n_positions, n_values, LAST: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets and mask of the tile [BLOCK_M, BLOCK_C] at value `start` of channels c."""
    m = start + tl.arange(0, BLOCK_M).to(tl.int64)
    if LAST:
        at = m[:, None] * n_channels + c[None, :]
    else:
        sample = m // n_positions
        first = sample * n_channels * n_positions + (m - sample * n_positions)
        at = first[:, None] + c[None, :] * n_positions
    return at, (m < n_values)[:, None] & (c < n_channels)[None, :]


@triton.jit
def batch_norm_moments_kernel(
    x_ptr, means_ptr, squares_ptr, n_channels, n_positions, n_values, ACC: tl.constexpr,
    LAST: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and squares around it of one chunk, [chunks, C] in float64; huge values are scaled."""
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    largest = tl.zeros([BLOCK_C], ACC)
    for step in range(0, CHUNK, BLOCK_M):
        at, mask = _place(chunk * CHUNK + step, c, n_channels, n_positions, n_values, LAST, BLOCK_M)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    limit = 1e150 if ACC == tl.float64 else 1e15
    divisor = tl.where((largest > limit) & (largest < float("inf")), largest, 1.0)
    total = tl.zeros([BLOCK_C], ACC)
    for step in range(0, CHUNK, BLOCK_M):
        at, mask = _place(chunk * CHUNK + step, c, n_channels, n_positions, n_values, LAST, BLOCK_M)
        total += tl.sum(tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC) / divisor[None, :], 0)
    count = tl.minimum(n_values - chunk * CHUNK, CHUNK).to(ACC)
    mean = total / count
    rest = tl.zeros([BLOCK_C], ACC)
    squares = tl.zeros([BLOCK_C], ACC)
    for step in range(0, CHUNK, BLOCK_M):
        at, mask = _place(chunk * CHUNK + step, c, n_channels, n_positions, n_values, LAST, BLOCK_M)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC) / divisor[None, :]
        d = tl.where(mask, x - mean[None, :], 0.0)
        rest += tl.sum(d, 0)
        squares += tl.sum(d * d, 0)
    wide = divisor.to(tl.float64)
    inside = c < n_channels
    # The mean was rounded; its remainder is the mean of the deviations from it.
    remainder = rest.to(tl.float64) / count.to(tl.float64)
    exact = mean.to(tl.float64) + tl.where(mean - mean == 0, remainder, 0.0)
    tl.store(means_ptr + chunk * n_channels + c, exact * wide, mask=inside)
    squares = (squares.to(tl.float64) - rest.to(tl.float64) * remainder) * wide * wide
    tl.store(squares_ptr + chunk * n_channels + c, squares, mask=inside)


@triton.jit
def batch_norm_fold_kernel(
    means_ptr, squares_ptr, mean_ptr, variance_ptr, n_channels, n_values, n_chunks,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The chunks merged in their order (Chan et al., 1979): mean and biased variance, float64."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < n_channels
    at = c.to(tl.int64)
    left = n_values + tl.zeros([BLOCK_C], tl.int64)
    before = tl.zeros([BLOCK_C], tl.float64)
    mean = tl.zeros([BLOCK_C], tl.float64)
    squares = tl.zeros([BLOCK_C], tl.float64)
    for _ in range(n_chunks):
        count = tl.minimum(left, CHUNK).to(tl.float64)
        delta = tl.load(means_ptr + at, mask=inside, other=0.0) - mean
        share = count / (before + count)
        mean += delta * share
        squares += tl.load(squares_ptr + at, mask=inside, other=0.0)
        squares += delta * delta * before * share
        before += count
        left -= CHUNK
        at += n_channels
    tl.store(mean_ptr + c, mean, mask=inside)
    tl.store(variance_ptr + c, squares / before, mask=inside)


@triton.jit
def _normalised(x_ptr, stats_ptr, at, mask, c, n_channels, ACC: tl.constexpr):
    """x_hat of a tile, and the channels' inverse deviations; the mean comes in two parts."""
    inside = c < n_channels
    mean = tl.load(stats_ptr + c, mask=inside, other=0.0)[None, :]
    rest = tl.load(stats_ptr + n_channels + c, mask=inside, other=0.0)[None, :]
    rstd = tl.load(stats_ptr + 2 * n_channels + c, mask=inside, other=0.0)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    return ((x - mean) - rest) * rstd, rstd


@triton.jit
def _affine(x_hat, weight_ptr, bias_ptr, c, n_channels, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    if WEIGHT:
        weight = tl.load(weight_ptr + c, mask=c < n_channels, other=0.0).to(x_hat.dtype)
        x_hat = x_hat * weight[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=c < n_channels, other=0.0).to(x_hat.dtype)
        x_hat = x_hat + bias[None, :]
    return x_hat


@triton.jit
def batch_norm_write_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, stats_ptr, y_ptr, n_channels, n_positions, n_values,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    at, mask = _place(start, c, n_channels, n_positions, n_values, LAST, BLOCK_M)
    x_hat, _ = _normalised(x_ptr, stats_ptr, at, mask, c, n_channels, ACC)
    y = _affine(x_hat, weight_ptr, bias_ptr, c, n_channels, WEIGHT, BIAS)
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
    y = activate(y, SLOPE, ACTIVATION)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(
    dy_ptr, x_ptr, residual_ptr, out_ptr, weight_ptr, bias_ptr, stats_ptr, at, mask, c, n_channels,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """g, the gradient before the activation, x_hat and rstd of a tile."""
    x_hat, rstd = _normalised(x_ptr, stats_ptr, at, mask, c, n_channels, ACC)
    g = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
    if OUT:
        out = tl.load(out_ptr + at, mask=mask, other=0.0).to(ACC)
        g = g * activate_grad(out, SLOPE, ACTIVATION)
    elif ACTIVATION != 0:
        pre = _affine(x_hat, weight_ptr, bias_ptr, c, n_channels, WEIGHT, BIAS)
        if RESIDUAL:
            pre += tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
        g = g * activate_grad(pre, SLOPE, ACTIVATION)
    return g, tl.where(mask, x_hat, 0.0), rstd


@triton.jit
def batch_norm_sums_kernel(
    dy_ptr, x_ptr, residual_ptr, out_ptr, weight_ptr, bias_ptr, stats_ptr, partials_ptr, n_channels,
    n_positions, n_values,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * x_hat over one chunk, [chunks, 2, C]."""
    chunk = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    g_sum = tl.zeros([BLOCK_C], ACC)
    h_sum = tl.zeros([BLOCK_C], ACC)
    for step in range(0, CHUNK, BLOCK_M):
        at, mask = _place(chunk * CHUNK + step, c, n_channels, n_positions, n_values, LAST, BLOCK_M)
        g, x_hat, _ = _gradient(
            dy_ptr, x_ptr, residual_ptr, out_ptr, weight_ptr, bias_ptr, stats_ptr, at, mask, c,
            n_channels, SLOPE, ACTIVATION, ACC, RESIDUAL, OUT, WEIGHT, BIAS,
        )  # fmt: skip
        g_sum += tl.sum(g, 0)
        h_sum += tl.sum(g * x_hat, 0)
    line = partials_ptr + chunk * 2 * n_channels + c
    tl.store(line, g_sum, mask=c < n_channels)
    tl.store(line + n_channels, h_sum, mask=c < n_channels)


@triton.jit
def batch_norm_dx_kernel(
    dy_ptr, x_ptr, residual_ptr, out_ptr, weight_ptr, bias_ptr, stats_ptr, sums_ptr, dx_ptr,
    dresidual_ptr, n_channels, n_positions, n_values, n_summed,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, TRAINING: tl.constexpr,
    DX: tl.constexpr, DRESIDUAL: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx from the two sums over `n_summed` values of each channel, and the residual's gradient."""
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    at, mask = _place(start, c, n_channels, n_positions, n_values, LAST, BLOCK_M)
    g, x_hat, rstd = _gradient(
        dy_ptr, x_ptr, residual_ptr, out_ptr, weight_ptr, bias_ptr, stats_ptr, at, mask, c,
        n_channels, SLOPE, ACTIVATION, ACC, RESIDUAL, OUT, WEIGHT, BIAS,
    )  # fmt: skip
    if DRESIDUAL:
        tl.store(dresidual_ptr + at, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if DX:
        if TRAINING:
            count = tl.cast(n_summed, ACC)
            g_mean = tl.load(sums_ptr + c, mask=c < n_channels, other=0.0) / count
            h_mean = tl.load(sums_ptr + n_channels + c, mask=c < n_channels, other=0.0) / count
            g = g - g_mean[None, :] - x_hat * h_mean[None, :]
        dx = _affine(g * rstd, weight_ptr, bias_ptr, c, n_channels, WEIGHT, False)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class _Walk:
    """An input [N, C, *], dense in the layout that results take, and how programs share it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.last = is_channels_last(x)
        self.x = self.dense(x)
        self.channels, self.positions = x.shape[1], positions_of(x)
        self.values = x.numel() // self.channels
        self.tile = dict(LAST if self.last or self.positions == 1 else PLANES)
        self.last = self.last or self.positions == 1
        chunk = self.tile.pop("CHUNK")
        self.chunk = dict(CHUNK=chunk)
        self.chunks = triton.cdiv(self.values, chunk)
        self.sizes = self.channels, self.positions, self.values

    def dense(self, t: torch.Tensor) -> torch.Tensor:
        """t in the input's layout; a copy where it lies otherwise."""
        target = empty_channels(t, self.last)
        return t if t.stride() == target.stride() else target.copy_(t)

    def grid(self, chunks: bool) -> tuple[int, int]:
        over = self.chunks if chunks else triton.cdiv(self.values, self.tile["BLOCK_M"])
        return over, triton.cdiv(self.channels, self.tile["BLOCK_C"])


def batch_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[torch.Tensor, ...]:
    walk = _Walk(x)
    none = x.new_empty((0,), dtype=torch.float32)
    new_mean, new_var = none, none
    if training:
        mean, variance = _moments(walk)
        unbiased = variance * (walk.values / (walk.values - 1))
        if running_mean is not None and running_var is not None:
            new_mean = _moved(running_mean, mean, momentum)
            new_var = _moved(running_var, unbiased, momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, variance = running_mean.double(), running_var.double()
    high = mean.to(shared.acc_dtype(x))
    stats = torch.stack((high, (mean - high).to(high.dtype), (variance + eps).rsqrt().to(high)))
    y = empty_channels(x, is_channels_last(x))
    batch_norm_write_kernel[walk.grid(False)](
        walk.x, _or(None if residual is None else walk.dense(residual), x), _or(weight, x),
        _or(bias, x), stats, y, *walk.sizes,
        SLOPE=negative_slope, ACTIVATION=activation, ACC=shared.acc(x),
        RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        LAST=walk.last, **walk.tile,
    )  # fmt: skip
    return y, stats, new_mean, new_var


def _moments(walk: _Walk) -> tuple[torch.Tensor, torch.Tensor]:
    shape = walk.chunks, walk.channels
    means, squares = (walk.x.new_empty(shape, dtype=torch.float64) for _ in range(2))
    batch_norm_moments_kernel[walk.grid(True)](
        walk.x, means, squares, *walk.sizes, ACC=shared.acc(walk.x), LAST=walk.last,
        **walk.chunk, **walk.tile,
    )  # fmt: skip
    mean, variance = (walk.x.new_empty(shape[1], dtype=torch.float64) for _ in range(2))
    batch_norm_fold_kernel[(triton.cdiv(walk.channels, 64),)](
        means, squares, mean, variance, walk.channels, walk.values, walk.chunks,
        **walk.chunk, BLOCK_C=64,
    )  # fmt: skip
    return mean, variance


def _moved(running: torch.Tensor, batch: torch.Tensor, momentum: float) -> torch.Tensor:
    return ((1.0 - momentum) * running.double() + momentum * batch).to(running.dtype)


def batch_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    y: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    training: bool,
    activation: int,
    negative_slope: float,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, ...]:
    walk = _Walk(x)
    none = x.new_empty((0,), dtype=torch.float32)
    others = [None if t is None else walk.dense(t) for t in (residual, y)]
    pointers = walk.dense(dy), walk.x, *(_or(t, x) for t in (*others, weight, bias)), stats
    flags: dict[str, Any] = dict(
        SLOPE=negative_slope, ACTIVATION=activation, ACC=shared.acc(x),
        RESIDUAL=residual is not None, OUT=y is not None, WEIGHT=weight is not None,
        BIAS=bias is not None, LAST=walk.last, **walk.tile,
    )  # fmt: skip
    sums = stats
    if need_dweight or need_dbias or (training and need_dx):
        sums = _sums(walk, pointers, flags, stats[:2])
    dx, dresidual = (
        empty_channels(x, is_channels_last(x)) if need else none
        for need in (need_dx, need_dresidual)
    )
    if need_dx or need_dresidual:
        batch_norm_dx_kernel[walk.grid(False)](
            *pointers, sums, dx if need_dx else x, dresidual if need_dresidual else x,
            *walk.sizes, walk.values, TRAINING=training, DX=need_dx, DRESIDUAL=need_dresidual,
            **flags,
        )  # fmt: skip
    dweight = sums[1].to(weight) if need_dweight and weight is not None else none
    dbias = sums[0].to(bias) if need_dbias and bias is not None else none
    return dx, dresidual, dweight, dbias


def _sums(
    walk: _Walk, pointers: tuple[torch.Tensor, ...], flags: dict[str, Any], like: torch.Tensor
) -> torch.Tensor:
    """Sums of g and of g * x_hat over all values, [2, C], typed as `like`."""
    partials = pointers[-1].new_empty((walk.chunks, 2 * walk.channels))
    batch_norm_sums_kernel[walk.grid(True)](*pointers, partials, *walk.sizes, **walk.chunk, **flags)
    return sum_partials(partials, like)


def batch_norm_moments(x: torch.Tensor) -> torch.Tensor:
    """Mean and sum of squares around it, [2, C] in float64."""
    walk = _Walk(x)
    mean, variance = _moments(walk)
    return torch.stack((mean, variance * walk.values))


def batch_norm_sums(dy: torch.Tensor, x: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Sums of dy and of dy * (x - mean), [2, C] in float64."""
    walk = _Walk(x)
    flags = _bare(walk)
    sums = _sums(walk, (walk.dense(dy), walk.x, x, x, x, x, stats), flags, stats[:2]).double()
    return torch.stack((sums[0], sums[1] / stats[2]))


def batch_norm_dx(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    means: torch.Tensor,
) -> torch.Tensor:
    """x's gradient, from the means of dy and of dy * (x - mean) over all processes."""
    walk = _Walk(x)
    dx = empty_channels(x, is_channels_last(x))
    means = torch.stack((means[0], means[1] * stats[2])).to(stats.dtype)
    flags = _bare(walk) | dict(WEIGHT=weight is not None)
    batch_norm_dx_kernel[walk.grid(False)](
        walk.dense(dy), walk.x, x, x, _or(weight, x), x, stats, means, dx, x, *walk.sizes, 1,
        TRAINING=True, DX=True, DRESIDUAL=False, **flags,
    )  # fmt: skip
    return dx


def _bare(walk: _Walk) -> dict[str, Any]:
    """The flags of a norm without residual and activation."""
    return dict(
        SLOPE=0.0, ACTIVATION=0, ACC=shared.acc(walk.x), RESIDUAL=False, OUT=False, WEIGHT=False,
        BIAS=False, LAST=walk.last, **walk.tile,
    )  # fmt: skip


def _or(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A pointer argument that the kernel will not read still has to be some tensor."""
    return placeholder if tensor is None else tensor


def _entries() -> tuple[Any, ...]:
    found = []
    wide = "weight_ptr", "bias_ptr", "stats_ptr", "partials_ptr", "sums_ptr"
    flags = dict(
        SLOPE=0.01, ACTIVATION=1, ACC=tl.float32, RESIDUAL=True, OUT=False, WEIGHT=True, BIAS=True,
        TRAINING=True, DX=True, DRESIDUAL=True,
    )  # fmt: skip
    for layout, tile, aligned in (
        ("planes", PLANES, ("n_positions",)),
        ("last", LAST, ("n_channels",)),
    ):
        constants = flags | tile | dict(LAST=layout == "last")
        for fn in (batch_norm_write_kernel, batch_norm_sums_kernel, batch_norm_dx_kernel):
            for dtype in ("bf16", "fp32"):
                name = f"{fn.__name__.removesuffix('_kernel')} {layout}"
                found.append(shared.entry(name, fn, dtype, constants, wide=wide, aligned=aligned))
        for fn, dtype in ((batch_norm_moments_kernel, "bf16"), (batch_norm_fold_kernel, "fp64")):
            entry = shared.entry(
                f"{fn.__name__.removesuffix('_kernel')} {layout}", fn, dtype, constants,
                aligned=aligned if "n_positions" in fn.arg_names else (),
            )  # fmt: skip
            doubles = {a: "*fp64" for a in ("means_ptr", "squares_ptr") if a in fn.arg_names}
            found.append(replace(entry, signature={**entry.signature, **doubles}))
    return tuple(found)


AOT = _entries()
