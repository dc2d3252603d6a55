"""The gradient of a broadcast bias: programs own a tile of it, and walk over the heads and samples
that share it in order."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from udlkernels.attention.attention.backward_kernels import row_values, score_gradient
from udlkernels.attention.attention.launch_tables import ALIBI, BIAS, HALF_HEAVY, LEFT, MASK, RIGHT
from udlkernels.attention.attention.sparse_kernels import RANGES, blocks_seen, row_ranges
from udlkernels.attention.attention.tile_kernels import (
    LOG2E,
    PLAIN,
    Problem,
    entry,
    key_blocks,
    key_length,
    load_tile,
    strides,
)


@triton.jit(do_not_specialize=PLAIN)
def attention_dbias_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dbias_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_t,
    dbias_b, dbias_h, dbias_t, dbias_s, samples_shared, heads_shared, bias_heads,
    mask_ptr, bias_ptr, lengths_ptr, slopes_ptr, seed_ptr,
    ranges_ptr, blocks_ptr, ranges_b, blocks_b, blocks_h, blocks_t, blocks_s, block_size,
    mask_b, mask_h, mask_t, mask_s, bias_b, bias_h, bias_t, bias_s,
    heads, group, queries, keys, offset, left, right, factor, cap,
    SUM_T: tl.constexpr, SUM_S: tl.constexpr,
    FACTOR: tl.constexpr, CAP: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    MODE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a broadcast bias, over the samples and heads that share it.

    With SUM_T (SUM_S) also the sum over the tile's queries (keys), one value for each tile.
    """
    key_tiles, query_tiles = tl.cdiv(keys, BLOCK_N), tl.cdiv(queries, BLOCK_M)
    key_tile = tl.program_id(0) % key_tiles
    query_tile = tl.program_id(0) // key_tiles % query_tiles
    unit = (tl.program_id(0) // key_tiles // query_tiles).to(tl.int64)
    b_out, h_out = unit // bias_heads, unit % bias_heads
    b_first, h_first = b_out * samples_shared, h_out * heads_shared
    if ACC == tl.float64:
        factor, cap = FACTOR, CAP
    first, start = query_tile * BLOCK_M, key_tile * BLOCK_N
    i, j = first + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    whole = queries, keys, keys, offset, left, right, 0, 0
    low, high, begin, _full_begin, _full_end, end = key_blocks(
        first, whole, BLOCK_M, BLOCK_N, (LEFT | RIGHT) & MODE
    )
    count = tl.where((start >= begin) & (start < end), samples_shared * heads_shared, 0)
    for n in range(count):
        b, h = b_first + n // heads_shared, h_first + n % heads_shared
        length = key_length(lengths_ptr, b, keys, MODE)
        lows, highs = 0, 0
        if RANGES & MODE:
            lows, highs = row_ranges(ranges_ptr + b * ranges_b, i, queries, keys)
        window = queries, keys, length, offset, left, right, lows, highs
        extras = (
            mask_ptr + b * mask_b + h * mask_h, mask_t, mask_s,
            bias_ptr + b * bias_b + h * bias_h, bias_t, bias_s,
            blocks_ptr + b * blocks_b + h * blocks_h, blocks_t, blocks_s, block_size,
        )  # fmt: skip
        slope = 0.0
        if ALIBI & MODE:
            slope = tl.load(slopes_ptr + b * heads + h).to(ACC) * LOG2E
        some, seen = blocks_seen(first, start, i[:, None], j[None, :], window, extras, MODE)
        if some:
            q_at = q_ptr + b * q_b + h * q_h
            dout_at = dout_ptr + b * dout_b + h * dout_h
            q = load_tile(q_at, q_t, first, 0, queries, BLOCK_M, BLOCK_D, D, True, WIDE)
            dout = load_tile(dout_at, dout_t, first, 0, queries, BLOCK_M, BLOCK_DV, DV, True, WIDE)
            row = (b * heads + h) * queries
            lse, delta = row_values(lse_ptr, delta_ptr, row, i, queries)
            ds, _dqk, _k = score_gradient(
                q, dout, lse, delta, start, i, seen, low, tl.minimum(high, length),
                k_ptr + b * k_b + h // group * k_h, k_s, v_ptr + b * v_b + h // group * v_h, v_s,
                seed_ptr, row + first, window, extras, slope, factor, cap, THRESHOLD, KEEP_SCALE,
                MODE, D, DV, BLOCK_D, BLOCK_DV, WIDE, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
            total += ds
    at = dbias_ptr + b_out * dbias_b + h_out * dbias_h
    i_at = i.to(tl.int64) * dbias_t
    j_at = j.to(tl.int64) * dbias_s
    kind = dbias_ptr.dtype.element_ty
    if SUM_T and SUM_S:
        at += query_tile.to(tl.int64) * dbias_t + key_tile * dbias_s
        tl.store(at, tl.sum(tl.sum(total, 1), 0))
    elif SUM_T:
        at += query_tile.to(tl.int64) * dbias_t
        tl.store(at + j_at, tl.sum(total, 0).to(kind), mask=j < keys)
    elif SUM_S:
        tl.store(at + key_tile * dbias_s + i_at, tl.sum(total, 1).to(kind), mask=i < queries)
    else:
        inside = (i < queries)[:, None] & (j < keys)[None, :]
        tl.store(at + i_at[:, None] + j_at[None, :], total.to(kind), mask=inside)


@triton.jit
def attention_fold_kernel(
    partials_ptr, out_ptr, count, width,
    BLOCK_COUNT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """out[o, w] = sum over c of partials[o, c, w]."""
    blocks = tl.cdiv(width, BLOCK_WIDTH)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    w = tl.program_id(0) % blocks * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_COUNT, BLOCK_WIDTH], partials_ptr.dtype.element_ty)
    for n in range(tl.cdiv(count, BLOCK_COUNT)):
        c = n * BLOCK_COUNT + tl.arange(0, BLOCK_COUNT)
        at = (outer * count + c)[:, None] * width + w[None, :]
        mask = (c < count)[:, None] & (w < width)[None, :]
        total += tl.load(partials_ptr + at, mask=mask, other=0.0)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + outer * width + w, out, mask=w < width)


def shared_along(bias: torch.Tensor) -> tuple[bool, ...]:
    """Along which dimensions one value serves several places."""
    return tuple(s == 0 and n > 1 for s, n in zip(bias.stride(), bias.shape, strict=True))


def bias_gradient(
    problem: Problem, dout: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor, shared: tuple[bool, ...],
) -> torch.Tensor:  # fmt: skip
    """The gradient of a bias, summed over the dimensions it is broadcast along."""
    tile = problem.launch.dkdv
    tiles = triton.cdiv(problem.queries, tile.block_m), triton.cdiv(problem.keys, tile.block_n)
    sizes = [1 if is_shared else n for is_shared, n in zip(shared, bias.shape, strict=True)]
    samples, heads = sizes[:2]
    for d in (2, 3):
        if shared[d]:
            sizes[d] = tiles[d - 2]
    folds = shared[2] or shared[3]
    dbias = bias.new_empty(sizes, dtype=problem.acc if folds else bias.dtype)
    q, k, v = problem.q, problem.k, problem.v
    attention_dbias_kernel[(tiles[0] * tiles[1] * samples * heads,)](
        q, k, v, dout, *rows, dbias, *strides(q, k, v, dout), *dbias.stride(),
        problem.batch // samples, problem.heads // heads, heads, *problem.common,
        SUM_T=shared[2], SUM_S=shared[3], **problem.at(tile),
    )  # fmt: skip
    if shared[2]:
        dbias = _fold(dbias, 2, problem.acc if shared[3] else bias.dtype)
    return _fold(dbias, 3, bias.dtype) if shared[3] else dbias


def _fold(partials: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums of a contiguous tensor along `dim`, in an order that depends on its extent alone."""
    sizes = list(partials.shape)
    count, sizes[dim] = sizes[dim], 1
    out = partials.new_empty(sizes, dtype=dtype)
    width = math.prod(sizes[dim:])
    block = 64 if width > 1 else 1
    programs = out.numel() // width * triton.cdiv(width, block)
    attention_fold_kernel[(programs,)](
        partials, out, count, width, BLOCK_COUNT=32, BLOCK_WIDTH=block, num_warps=4
    )
    return out


_FULL = MASK.value | BIAS.value | RIGHT.value
AOT = tuple(
    entry(attention_dbias_kernel, "causal bias mask", "bf16", row.limit, row.dkdv, _FULL,
          SUM_T=False, SUM_S=False)
    for row in HALF_HEAVY
)  # fmt: skip
