"""group_norm, instance_norm and their fused forms on a GPU.

A tensor is [samples, channels, positions], in "planes" (positions side by side) or in "lines"
(channels side by side, channels-last). Sums are taken per channel over chunks of positions, whose
size depends on the sizes of one sample alone, then folded to groups: one order of every sum,
however many samples or multiprocessors there are. Traffic per element: forward reads x twice and
writes y; backward reads dy and x twice and writes dx.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry
from udlkernels.normalization._activation_kernels import activate, activate_grad
from udlkernels.normalization._row_kernels import sum_partials
from udlkernels.normalization.group_norm.op import result_like

# Elements of a tile: 32 a thread at 4 warps, enough for 128-bit loads of every type and, in the
# backward with an activation, 90 to 130 registers.
TILE = 4096
WARPS = 4
# Channels of a tile in lines: one position's line of them is 256 bytes in bfloat16.
LINE_CHANNELS = 128
# Positions of a tile in planes, at most: 8 elements a thread along a row.
PLANE_POSITIONS = 1024


@triton.jit
def _place(
    chunks, channels, positions, LINES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Sample, chunk, channels, positions and mask of a program's tile."""
    unit = tl.program_id(0).to(tl.int64)
    chunk = unit % chunks
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    if LINES:
        mask = (p < positions)[:, None] & (c < channels)[None, :]  # [BLOCK_P, BLOCK_C]
    else:
        mask = (c < channels)[:, None] & (p < positions)[None, :]  # [BLOCK_C, BLOCK_P]
    return unit // chunks, chunk, c, p, mask


@triton.jit
def _at(n, c, p, sample_stride, stride, LINES: tl.constexpr):
    """Offsets of a tile; stride is that of a channel in planes, of a position in lines."""
    if LINES:
        return n * sample_stride + p[:, None] * stride + c[None, :]
    else:
        return n * sample_stride + c[:, None] * stride + p[None, :]


@triton.jit
def _spread(values, LINES: tl.constexpr):
    """[BLOCK_C], to broadcast over a tile."""
    return values[None, :] if LINES else values[:, None]


@triton.jit
def _safe_divisor(largest, ACC: tl.constexpr):
    """What to divide values by so that their squares cannot overflow: 1 for all but huge ones."""
    limit = 1e150 if ACC == tl.float64 else 1e15
    return tl.where((largest > limit) & (largest < float("inf")), largest, 1.0)


@triton.jit
def group_norm_moments_kernel(
    x_ptr, partials_ptr, x_sample, x_stride, channels, positions, chunks,
    ACC: tl.constexpr, LINES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean and standard deviation of every channel over one chunk."""
    n, chunk, c, p, mask = _place(chunks, channels, positions, LINES, BLOCK_C, BLOCK_P)
    axis: tl.constexpr = 0 if LINES else 1
    count = tl.minimum(positions - chunk * BLOCK_P, BLOCK_P).to(ACC)
    x = tl.load(x_ptr + _at(n, c, p, x_sample, x_stride, LINES), mask=mask, other=0.0).to(ACC)
    divisor = _safe_divisor(tl.max(tl.abs(x), axis), ACC)
    x = x / _spread(divisor, LINES)
    mean = tl.sum(x, axis) / count
    d = tl.where(mask, x - _spread(mean, LINES), 0.0)
    deviation = tl.sqrt(tl.sum(d * d, axis) / count)
    out = partials_ptr + (n * chunks + chunk) * 2 * channels + c
    tl.store(out, mean * divisor, mask=c < channels)
    tl.store(out + channels, deviation * divisor, mask=c < channels)


@triton.jit
def group_norm_fold_kernel(
    partials_ptr, stats_ptr, n_stats, groups, group_channels, channels, positions, chunks,
    EPS: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The statistics of one group from those of its channels in all chunks."""
    index = tl.program_id(0).to(tl.int64)
    n, first = index // groups, index % groups * group_channels
    c, k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    base = partials_ptr + n * chunks * 2 * channels + first
    size = (group_channels * positions).to(ACC)
    total = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    largest = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    for start_k in range(0, chunks, BLOCK_K):
        count = tl.minimum(positions - (start_k + k) * CHUNK, CHUNK).to(ACC)
        for start_c in range(0, group_channels, BLOCK_C):
            at = (start_k + k)[:, None] * 2 * channels + (start_c + c)[None, :]
            mask = (start_k + k < chunks)[:, None] & (start_c + c < group_channels)[None, :]
            mean = tl.load(base + at, mask=mask, other=0.0)
            deviation = tl.load(base + channels + at, mask=mask, other=0.0)
            total += mean * (tl.where(mask, count[:, None], 0.0) / size)
            largest = tl.maximum(largest, tl.maximum(tl.abs(mean), deviation))
    mean_all = tl.sum(tl.sum(total, 1), 0)
    divisor = _safe_divisor(tl.max(tl.max(largest, 1), 0), ACC)
    squares = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    for start_k in range(0, chunks, BLOCK_K):
        count = tl.minimum(positions - (start_k + k) * CHUNK, CHUNK).to(ACC)
        for start_c in range(0, group_channels, BLOCK_C):
            at = (start_k + k)[:, None] * 2 * channels + (start_c + c)[None, :]
            mask = (start_k + k < chunks)[:, None] & (start_c + c < group_channels)[None, :]
            mean = tl.load(base + at, mask=mask, other=0.0)
            deviation = tl.load(base + channels + at, mask=mask, other=0.0) / divisor
            delta = (mean - mean_all) / divisor
            square = (deviation * deviation + delta * delta) * (count[:, None] / size)
            squares += tl.where(mask, square, 0.0)
    var = tl.sum(tl.sum(squares, 1), 0)
    rstd = 1.0 / tl.sqrt(var + EPS / divisor / divisor) / divisor
    tl.store(stats_ptr + index, mean_all)
    tl.store(stats_ptr + n_stats + index, rstd)
    tl.store(stats_ptr + 2 * n_stats + index, var * divisor * divisor)
    tl.store(stats_ptr + 3 * n_stats + index, mean_all * 0.0)


@triton.jit
def _affine(
    stats_ptr, weight_ptr, bias_ptr, n, c, n_stats, groups, group_channels, affine_stride, inside,
    ACC: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """mean, rstd, weight and bias of channels c of sample n."""
    group = n * groups + c // group_channels
    mean = tl.load(stats_ptr + group, mask=inside, other=0.0)
    rstd = tl.load(stats_ptr + n_stats + group, mask=inside, other=0.0)
    weight = tl.full(mean.shape, 1.0, ACC)
    bias = tl.zeros(mean.shape, ACC)
    if WEIGHT:
        weight = tl.load(weight_ptr + n * affine_stride + c, mask=inside, other=0.0).to(ACC)
    if BIAS:
        bias = tl.load(bias_ptr + n * affine_stride + c, mask=inside, other=0.0).to(ACC)
    return mean, rstd, weight, bias


@triton.jit
def group_norm_write_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, stats_ptr, y_ptr,
    x_sample, x_stride, residual_sample, residual_stride, y_sample, y_stride,
    n_stats, groups, group_channels, affine_stride, channels, positions, chunks,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, LINES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, _, c, p, mask = _place(chunks, channels, positions, LINES, BLOCK_C, BLOCK_P)
    mean, rstd, weight, bias = _affine(
        stats_ptr, weight_ptr, bias_ptr, n, c, n_stats, groups, group_channels, affine_stride,
        c < channels, ACC, WEIGHT, BIAS,
    )  # fmt: skip
    x = tl.load(x_ptr + _at(n, c, p, x_sample, x_stride, LINES), mask=mask, other=0.0).to(ACC)
    y = (x - _spread(mean, LINES)) * _spread(rstd * weight, LINES) + _spread(bias, LINES)
    if RESIDUAL:
        at = _at(n, c, p, residual_sample, residual_stride, LINES)
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
    y = activate(y, SLOPE, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + _at(n, c, p, y_sample, y_stride, LINES), y, mask=mask)


@triton.jit
def group_norm_sums_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, stats_ptr, gradient_ptr, partials_ptr,
    dy_sample, dy_stride, x_sample, x_stride, residual_sample, residual_stride, y_sample, y_stride,
    n_stats, groups, group_channels, affine_stride, channels, positions, chunks,
    SLOPE: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, LINES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums over one chunk of g and g * (x - mean), where g = dy * act', which is written down."""
    n, chunk, c, p, mask = _place(chunks, channels, positions, LINES, BLOCK_C, BLOCK_P)
    axis: tl.constexpr = 0 if LINES else 1
    mean, rstd, weight, bias = _affine(
        stats_ptr, weight_ptr, bias_ptr, n, c, n_stats, groups, group_channels, affine_stride,
        c < channels, ACC, WEIGHT, BIAS,
    )  # fmt: skip
    x = tl.load(x_ptr + _at(n, c, p, x_sample, x_stride, LINES), mask=mask, other=0.0).to(ACC)
    g = tl.load(dy_ptr + _at(n, c, p, dy_sample, dy_stride, LINES), mask=mask, other=0.0).to(ACC)
    centred = x - _spread(mean, LINES)
    if ACTIVATION > 0:
        pre = centred * _spread(rstd * weight, LINES) + _spread(bias, LINES)
        if RESIDUAL:
            at = _at(n, c, p, residual_sample, residual_stride, LINES)
            pre += tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
        g = tl.where(mask, g * activate_grad(pre, SLOPE, ACTIVATION), 0.0)
        at = _at(n, c, p, y_sample, y_stride, LINES)
        tl.store(gradient_ptr + at, g.to(gradient_ptr.dtype.element_ty), mask=mask)
    out = partials_ptr + (n * chunks + chunk) * 2 * channels + c
    tl.store(out, tl.sum(g, axis), mask=c < channels)
    tl.store(out + channels, tl.sum(g * centred, axis), mask=c < channels)


@triton.jit
def group_norm_fold_sums_kernel(
    partials_ptr, stats_ptr, weight_ptr, sums_ptr, factors_ptr, n_stats, groups, group_channels,
    affine_stride, channels, positions, chunks,
    ACC: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of one group: its channels' gradients of bias and weight, and the two factors of dx."""
    index = tl.program_id(0).to(tl.int64)
    n, first = index // groups, index % groups * group_channels
    rstd = tl.load(stats_ptr + n_stats + index)
    s1_group = tl.zeros([BLOCK_C], ACC)
    s2_group = tl.zeros([BLOCK_C], ACC)
    for start in range(0, group_channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = c < group_channels
        s1 = tl.zeros([BLOCK_C], ACC)
        s2 = tl.zeros([BLOCK_C], ACC)
        for k in range(chunks):
            line = partials_ptr + (n * chunks + k) * 2 * channels + first + c
            s1 += tl.load(line, mask=mask, other=0.0)
            s2 += tl.load(line + channels, mask=mask, other=0.0)
        out = sums_ptr + n * channels + first + c
        tl.store(out, s1, mask=mask)
        tl.store(out + n_stats * group_channels, s2 * rstd, mask=mask)
        if WEIGHT:
            at = n * affine_stride + first + c
            weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(ACC)
            s1, s2 = s1 * weight, s2 * weight
        s1_group += s1
        s2_group += s2
    count = (group_channels * positions).to(ACC)
    tl.store(factors_ptr + index, rstd * (rstd * tl.sum(s2_group, 0) / count))
    tl.store(factors_ptr + n_stats + index, rstd * (tl.sum(s1_group, 0) / count))


@triton.jit
def group_norm_dx_kernel(
    g_ptr, x_ptr, weight_ptr, stats_ptr, factors_ptr, dx_ptr,
    g_sample, g_stride, x_sample, x_stride, dx_sample, dx_stride,
    n_stats, groups, group_channels, affine_stride, channels, positions, chunks,
    ACC: tl.constexpr, WEIGHT: tl.constexpr, LINES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, _, c, p, mask = _place(chunks, channels, positions, LINES, BLOCK_C, BLOCK_P)
    inside = c < channels
    mean, rstd, weight, _ = _affine(
        stats_ptr, weight_ptr, weight_ptr, n, c, n_stats, groups, group_channels, affine_stride,
        inside, ACC, WEIGHT, False,
    )  # fmt: skip
    group = n * groups + c // group_channels
    by_deviation = tl.load(factors_ptr + group, mask=inside, other=0.0)
    constant = tl.load(factors_ptr + n_stats + group, mask=inside, other=0.0)
    x = tl.load(x_ptr + _at(n, c, p, x_sample, x_stride, LINES), mask=mask, other=0.0).to(ACC)
    g = tl.load(g_ptr + _at(n, c, p, g_sample, g_stride, LINES), mask=mask, other=0.0).to(ACC)
    x_hat = (x - _spread(mean, LINES)) * _spread(rstd, LINES)
    dx = g * _spread(rstd * weight, LINES) - x_hat * _spread(by_deviation, LINES)
    dx = (dx - _spread(constant, LINES)).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + _at(n, c, p, dx_sample, dx_stride, LINES), dx, mask=mask)


def tile(channels: int, positions: int, lines: bool) -> tuple[int, int]:
    """BLOCK_C and BLOCK_P; by the sizes of one sample alone."""
    if lines:
        block_c = min(triton.next_power_of_2(channels), LINE_CHANNELS)
        return block_c, min(TILE // block_c, max(16, triton.next_power_of_2(positions)))
    block_p = min(max(16, triton.next_power_of_2(positions)), PLANE_POSITIONS)
    return min(TILE // block_p, triton.next_power_of_2(channels)), block_p


class _Maps:
    """A tensor in planes or lines: where it starts, and its two strides that are not 1."""

    def __init__(self, tensor: torch.Tensor, lines: bool) -> None:
        if tensor.dim() == 2:
            tensor = tensor.unsqueeze(2)
        maps = tensor.movedim(1, -1).flatten(1, -2) if lines else tensor.flatten(2)
        if maps.stride(2) != 1 and maps.shape[2] != 1:
            maps = maps.contiguous()
        self.tensor = maps
        self.strides = maps.stride(0), maps.stride(1)


class _Problem:
    """What all launches of a call pass alike."""

    def __init__(self, x: torch.Tensor, groups: int, channels_last: bool) -> None:
        self.samples, self.channels = x.shape[:2]
        self.positions = x.numel() // (self.samples * self.channels)
        self.groups, self.group_channels = groups, self.channels // groups
        self.lines = channels_last or self.positions == 1
        self.block_c, self.block_p = tile(self.channels, self.positions, self.lines)
        self.chunks = triton.cdiv(self.positions, self.block_p)
        self.grid = (self.samples * self.chunks, triton.cdiv(self.channels, self.block_c))
        self.groups_grid = (self.samples * groups,)
        self.sizes = self.channels, self.positions, self.chunks
        self.grouping = self.samples * groups, groups, self.group_channels
        double = x.dtype == torch.float64
        self.acc_dtype = torch.float64 if double else torch.float32
        self.acc = tl.float64 if double else tl.float32
        self.block = dict(
            ACC=self.acc, LINES=self.lines, BLOCK_C=self.block_c, BLOCK_P=self.block_p,
            num_warps=WARPS,
        )  # fmt: skip
        self.partials = x.new_empty(
            (self.samples, self.chunks, 2, self.channels), dtype=self.acc_dtype
        )


def _params(
    weight: torch.Tensor | None, bias: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pointers and the stride from sample to sample: 0, or channels where each has its own."""
    either = weight if weight is not None else bias
    stride = x.shape[1] if either is not None and either.dim() == 2 else 0
    return (
        x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(),
        stride,
    )


def group_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    groups: int,
    eps: float,
    activation: int,
    negative_slope: float,
    channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    problem = _Problem(x, groups, channels_last)
    y = result_like(x, channels_last)
    stats = x.new_empty((4, problem.samples, groups), dtype=problem.acc_dtype)
    maps, out = _Maps(x, problem.lines), _Maps(y, problem.lines)
    beside = maps if residual is None else _Maps(residual, problem.lines)
    w, b, affine_stride = _params(weight, bias, x)
    group_norm_moments_kernel[problem.grid](
        maps.tensor, problem.partials, *maps.strides, *problem.sizes, **problem.block
    )
    group_norm_fold_kernel[problem.groups_grid](
        problem.partials, stats, *problem.grouping, *problem.sizes,
        EPS=eps, ACC=problem.acc, CHUNK=problem.block_p, **_fold_block(problem.group_channels),
    )  # fmt: skip
    group_norm_write_kernel[problem.grid](
        maps.tensor, beside.tensor, w, b, stats, out.tensor,
        *maps.strides, *beside.strides, *out.strides,
        *problem.grouping, affine_stride, *problem.sizes,
        SLOPE=negative_slope, ACTIVATION=activation, WEIGHT=weight is not None,
        BIAS=bias is not None, RESIDUAL=residual is not None, **problem.block,
    )  # fmt: skip
    return y, stats


def _fold_block(group_channels: int) -> dict[str, int]:
    block_c = min(triton.next_power_of_2(group_channels), 64)
    return {"BLOCK_C": block_c, "BLOCK_K": 1024 // block_c, "num_warps": WARPS}


def group_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stats: torch.Tensor,
    groups: int,
    activation: int,
    negative_slope: float,
    channels_last: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    problem = _Problem(x, groups, channels_last)
    maps, dys = _Maps(x, problem.lines), _Maps(dy, problem.lines)
    beside = maps if residual is None else _Maps(residual, problem.lines)
    w, b, affine_stride = _params(weight, bias, x)
    dx = result_like(x, channels_last)
    gradient = result_like(x, channels_last) if activation and need_dresidual else dx
    g, dxs = _Maps(gradient, problem.lines), _Maps(dx, problem.lines)
    sums = x.new_empty((2, problem.samples, problem.channels), dtype=problem.acc_dtype)
    factors = x.new_empty((2, problem.samples, groups), dtype=problem.acc_dtype)
    group_norm_sums_kernel[problem.grid](
        dys.tensor, maps.tensor, beside.tensor, w, b, stats, g.tensor, problem.partials,
        *dys.strides, *maps.strides, *beside.strides, *g.strides,
        *problem.grouping, affine_stride, *problem.sizes,
        SLOPE=negative_slope, ACTIVATION=activation, WEIGHT=weight is not None,
        BIAS=bias is not None, RESIDUAL=residual is not None, **problem.block,
    )  # fmt: skip
    group_norm_fold_sums_kernel[problem.groups_grid](
        problem.partials, stats, w, sums, factors, *problem.grouping, affine_stride,
        *problem.sizes, ACC=problem.acc, WEIGHT=weight is not None,
        BLOCK_C=min(triton.next_power_of_2(problem.group_channels), 128), num_warps=1,
    )  # fmt: skip
    if need_dx:
        source = g if activation else dys
        group_norm_dx_kernel[problem.grid](
            source.tensor, maps.tensor, w, stats, factors, dxs.tensor,
            *source.strides, *maps.strides, *dxs.strides,
            *problem.grouping, affine_stride, *problem.sizes,
            WEIGHT=weight is not None, **problem.block,
        )  # fmt: skip
    none = x.new_empty((0,), dtype=torch.float32)
    return (
        dx if need_dx else none,
        gradient if activation and need_dresidual else none.clone(),
        _parameter_gradient(sums[1], weight, need_dweight, none),
        _parameter_gradient(sums[0], bias, need_dbias, none),
    )


def _parameter_gradient(
    sums: torch.Tensor, like: torch.Tensor | None, wanted: bool, none: torch.Tensor
) -> torch.Tensor:
    if not wanted or like is None:
        return none.clone()
    return sums.to(like.dtype, copy=True) if like.dim() == 2 else sum_partials(sums, like)


_FLOAT32 = ("partials_ptr", "stats_ptr", "sums_ptr", "factors_ptr")


def _entry(fn: Any, dtype: str, lines: bool, act: int, warps: int = WARPS) -> Entry:
    """One launch of `fn` in the sizes of 320 channels in 32 groups, 64 x 64 positions."""
    block_c, block_p = tile(320, 4096, lines)
    known = dict(
        EPS=1e-5, SLOPE=0.01, ACTIVATION=act, ACC=tl.float32, WEIGHT=True, BIAS=True,
        RESIDUAL=act > 0, LINES=lines, CHUNK=block_p, BLOCK_K=64, BLOCK_C=block_c, BLOCK_P=block_p,
    )  # fmt: skip
    if fn in (group_norm_fold_kernel, group_norm_fold_sums_kernel):
        known["BLOCK_C"] = 16
    names = list(fn.arg_names)
    signature = {
        name: ("*fp32" if name in _FLOAT32 else f"*{dtype}") if name.endswith("_ptr") else "i32"
        for name in names
        if not name.isupper()
    }
    divisible = tuple(
        name
        for name in signature
        if name.endswith(("_ptr", "_sample")) or name in ("channels", "positions")
        or (name.endswith("_stride") and name != "affine_stride")
    )  # fmt: skip
    label = f"{fn.__name__.removesuffix('_kernel')} {dtype} {'lines' if lines else 'planes'}"
    constexprs = {name: known[name] for name in names if name.isupper()}
    return Entry(label + (" silu" if act else ""), fn, signature, constexprs, divisible, warps)


AOT = (
    *(
        _entry(fn, dtype, lines, 0)
        for fn in (
            group_norm_moments_kernel, group_norm_write_kernel, group_norm_sums_kernel,
            group_norm_dx_kernel,
        )
        for dtype in ("bf16", "fp32")
        for lines in (False, True)
    ),
    *(
        _entry(fn, dtype, lines, 5)
        for fn in (group_norm_write_kernel, group_norm_sums_kernel)
        for dtype in ("bf16", "fp32")
        for lines in (False, True)
    ),
    _entry(group_norm_fold_kernel, "fp32", False, 0),
    _entry(group_norm_fold_sums_kernel, "fp32", False, 0, 1),
)  # fmt: skip
