"""Attention on a GPU: the forward kernel, the launches, and what is compiled ahead of time.

One program owns BLOCK_M queries of one head and walks over the keys they see: blocks that need no
mask first, then those that window or key length cut; the others are never read. Softmax weights
exist for one tile at a time. Each sum over keys runs in the order of these blocks, which depends on
the number of keys and the query's own place alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels.attention.attention import backward_kernels, bias_kernels
from udlkernels.attention.attention.backward_kernels import (
    attention_delta_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_dsinks_kernel,
)
from udlkernels.attention.attention.bias_kernels import bias_gradient, shared_along
from udlkernels.attention.attention.launch_tables import (
    ALIBI,
    BIAS,
    HALF,
    HALF_HEAVY,
    HALF_TILES,
    LEFT,
    MASK,
    RIGHT,
    SELECTS,
    SINGLE,
    SINGLE_SPARSE,
    SINKS,
    SOFTCAP,
    WIDE_STRIDE,
)
from udlkernels.attention.attention.sdpa import result
from udlkernels.attention.attention.sparse_kernels import (
    BLOCKS,
    RANGES,
    TILES,
    blocks_seen,
    row_ranges,
)
from udlkernels.attention.attention.tile_kernels import (
    LN2,
    LOG2E,
    PLAIN,
    Problem,
    clean,
    dot,
    entry,
    kept,
    key_blocks,
    key_length,
    load_tile,
    logits,
    masked_start,
    or_placeholder,
    placed,
    store_tile,
    strides,
    tile_count,
)


@triton.jit
def _attend(
    acc, total, peak, q, start, first, low, high, k_ptr, k_s, v_ptr, v_s, seed_ptr, first_row,
    window, extras, slope, factor, cap,
    THRESHOLD: tl.constexpr, MODE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FOLD: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """One block of keys joins the weighted sum of values, the sum of weights and the maximum."""
    i, j = first + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N)
    some, seen = blocks_seen(first, start, i[:, None], j[None, :], window, extras, MODE)
    if some:
        k = load_tile(k_ptr, k_s, start, low, high, BLOCK_N, BLOCK_D, D, BOUND, WIDE)
        qk = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], acc.dtype))
        s, _ = logits(
            qk, i[:, None], j[None, :], window, extras, slope, factor, cap, MODE, not FOLD, BOUND,
            seen,
        )  # fmt: skip
        # A row that has seen nothing yet has the maximum -inf; its weights are taken against 0.
        if FOLD:
            new_peak = tl.maximum(peak, tl.max(s, 1) * factor)
            against = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p = tl.exp2(s * factor - against[:, None])
        else:
            new_peak = tl.maximum(peak, tl.max(s, 1))
            against = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p = tl.exp2(s - against[:, None])
        shrink = tl.exp2(peak - against)
        total = total * shrink + tl.sum(p, 1)
        if THRESHOLD > 0:
            p = tl.where(kept(seed_ptr, first_row, start, THRESHOLD, BLOCK_M, BLOCK_N), p, 0.0)
        v = load_tile(v_ptr, v_s, start, low, high, BLOCK_N, BLOCK_DV, DV, BOUND, WIDE)
        if (SELECTS & MODE) != 0 or (BOUND and (RANGES & MODE) != 0):
            v = clean(v, s, 0)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=PLAIN)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_t,
    mask_ptr, bias_ptr, lengths_ptr, slopes_ptr, seed_ptr,
    ranges_ptr, blocks_ptr, ranges_b, blocks_b, blocks_h, blocks_t, blocks_s, block_size,
    mask_b, mask_h, mask_t, mask_s, bias_b, bias_h, bias_t, bias_s,
    heads, group, queries, keys, offset, left, right, factor, cap, cu_q_ptr, cu_k_ptr, samples,
    FACTOR: tl.constexpr, CAP: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    MODE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    tiles = tile_count(queries, cu_q_ptr, samples, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if RIGHT & MODE:
        tile = tiles - 1 - tile  # the queries that see most keys start first
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    row = unit * queries
    b, h, unit, first, q_start, own, k_start, met = placed(
        tile, unit, queries, keys, heads, cu_q_ptr, cu_k_ptr, samples, BLOCK_M
    )  # fmt: skip
    row += q_start
    queries, keys = own, met
    if cu_q_ptr is not None:
        offset *= keys - queries
    if ACC == tl.float64:
        factor, cap = FACTOR, CAP
    i = first + tl.arange(0, BLOCK_M)
    lows, highs = 0, 0
    if RANGES & MODE:
        lows, highs = row_ranges(ranges_ptr + b * ranges_b, i, queries, keys)
    length = key_length(lengths_ptr, b, keys, MODE)
    window = queries, keys, length, offset, left, right, lows, highs
    extras = (
        mask_ptr + b * mask_b + h * mask_h, mask_t, mask_s,
        bias_ptr + b * bias_b + h * bias_h, bias_t, bias_s,
        blocks_ptr + b * blocks_b + h * blocks_h, blocks_t, blocks_s, block_size,
    )  # fmt: skip
    slope = 0.0
    if ALIBI & MODE:
        slope = tl.load(slopes_ptr + unit).to(ACC) * LOG2E
    q_ptr += b * q_b + h * q_h + q_start * q_t
    k_ptr += b * k_b + h // group * k_h + k_start * k_s
    v_ptr += b * v_b + h // group * v_h + k_start * v_s
    q = load_tile(q_ptr, q_t, first, 0, queries, BLOCK_M, BLOCK_D, D, True, WIDE)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], float("-inf"), ACC)
    if SINKS & MODE:
        sink = tl.load(sinks_ptr + h).to(ACC) * LOG2E
        if cu_q_ptr is not None:  # rows behind the last sequence have no sink either
            sink = tl.where(unit < samples * heads, sink, float("-inf"))
        peak = tl.zeros([BLOCK_M], ACC) + sink
        total += tl.where(sink == float("-inf"), 0.0, 1.0)

    low, high, begin, full_begin, full_end, end = key_blocks(first, window, BLOCK_M, BLOCK_N, MODE)
    if RANGES & MODE:  # in order, whatever other queries of the tile see
        for n in range((full_begin - begin) // BLOCK_N):
            acc, total, peak = _attend(
                acc, total, peak, q, begin + n * BLOCK_N, first, low, high, k_ptr, k_s, v_ptr, v_s,
                seed_ptr, row + first, window, extras, slope, factor, cap,
                THRESHOLD, MODE, D, DV, BLOCK_D, BLOCK_DV, WIDE, BLOCK_M, BLOCK_N, FOLD, True,
            )  # fmt: skip
        begin = full_begin
    if (BLOCKS & MODE) == 0:
        for n in range((full_end - full_begin) // BLOCK_N):
            acc, total, peak = _attend(
                acc, total, peak, q, full_begin + n * BLOCK_N, first, low, high, k_ptr, k_s, v_ptr,
                v_s, seed_ptr, row + first, window, extras, slope, factor, cap,
                THRESHOLD, MODE, D, DV, BLOCK_D, BLOCK_DV, WIDE, BLOCK_M, BLOCK_N, FOLD, False,
            )  # fmt: skip
    for n in range((full_begin - begin + end - full_end) // BLOCK_N):
        start = masked_start(n, begin, full_begin, full_end, BLOCK_N, (LEFT & MODE) != 0)
        acc, total, peak = _attend(
            acc, total, peak, q, start, first, low, high, k_ptr, k_s, v_ptr, v_s,
            seed_ptr, row + first, window, extras, slope, factor, cap,
            THRESHOLD, MODE, D, DV, BLOCK_D, BLOCK_DV, WIDE, BLOCK_M, BLOCK_N, FOLD, True,
        )  # fmt: skip

    divisor = tl.where(total == 0.0, 1.0, total)
    out = acc * (KEEP_SCALE / divisor)[:, None]
    out_ptr += b * out_b + h * out_h + q_start * out_t
    store_tile(out, out_ptr, out_t, first, queries, BLOCK_M, BLOCK_DV, DV, WIDE)
    lse = tl.where(total == 0.0, float("-inf"), (peak + tl.log2(divisor)) * LN2)
    tl.store(lse_ptr + row + i, lse, mask=i < queries)


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    bias: torch.Tensor | None, key_lengths: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None, ranges: torch.Tensor | None,
    block_mask: torch.Tensor | None, block_size: int, offset: int, left: int, right: int,
    scale: float, softcap: float, dropout_p: float, seed: torch.Tensor | None, heads_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    problem = Problem(
        q, k, v, mask, bias, key_lengths, alibi_slopes, sinks, ranges, block_mask, block_size,
        offset, left, right, scale, softcap, dropout_p, seed,
    )  # fmt: skip
    out = result(q, problem.v_width, heads_last)
    return out, launch_fwd(problem, sinks, out)


def launch_fwd(problem: Problem, sinks: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """Writes out, returns lse."""
    q, k, v, tile = problem.q, problem.k, problem.v, problem.launch.forward
    lse = q.new_empty(q.shape[:3], dtype=problem.acc)
    attention_fwd_kernel[(problem.programs(tile.block_m),)](
        q, k, v, or_placeholder(sinks, q), out, lse, *strides(q, k, v, out), *problem.common,
        *problem.packed, FOLD=problem.fold, **problem.at(tile),
    )  # fmt: skip
    return lse


def attention_bwd(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, mask: torch.Tensor | None,
    bias: torch.Tensor | None, key_lengths: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None, ranges: torch.Tensor | None,
    block_mask: torch.Tensor | None, block_size: int, offset: int, left: int, right: int,
    scale: float, softcap: float, dropout_p: float, seed: torch.Tensor | None, heads_last: bool,
    need_dq: bool, need_dkv: bool, need_dbias: bool, need_dsinks: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv, dbias, dsinks; what is not wanted comes back without elements."""
    problem = Problem(
        q, k, v, mask, bias, key_lengths, alibi_slopes, None, ranges, block_mask, block_size,
        offset, left, right, scale, softcap, dropout_p, seed,
    )  # fmt: skip
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    problem.constexprs["WIDE"] |= dout.stride(2) >= WIDE_STRIDE
    dq, dk, dv, dbias, dsinks = (q.new_empty((0,), dtype=torch.float32) for _ in range(5))
    delta = launch_delta(problem, dout, dlse, out)
    rows = lse.contiguous(), delta
    if need_dkv:
        dk, dv = result(k, problem.width, heads_last), result(v, problem.v_width, heads_last)
        launch_dkdv(problem, dout, rows, dk, dv)
    along = False
    if need_dbias and bias is not None:
        shared = shared_along(bias)
        along = need_dq and not any(shared)
        if along:
            dbias = bias.new_zeros(bias.shape)
        else:
            dbias = bias_gradient(problem, dout, rows, bias, shared)
    if need_dq:
        dq = result(q, problem.width, heads_last)
        launch_dq(problem, dout, rows, dq, dbias if along else None)
    if need_dsinks and sinks is not None:
        dsinks = launch_dsinks(problem, sinks, rows)
    return dq, dk, dv, dbias, dsinks


def launch_delta(
    problem: Problem, dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    delta = dout.new_empty(dout.shape[:3], dtype=problem.acc)
    block = 32 if problem.v_width <= 128 else 8
    programs = triton.cdiv(problem.queries, block) * problem.batch * problem.heads
    known = {name: problem.constexprs[name] for name in ("ACC", "DV", "BLOCK_DV", "WIDE")}
    attention_delta_kernel[(programs,)](
        dout, out, delta if dlse is None else dlse.contiguous(), delta, *strides(dout, out),
        problem.heads, problem.queries, DLSE=dlse is not None, BLOCK_M=block, num_warps=4, **known,
    )  # fmt: skip
    return delta


def launch_dkdv(
    problem: Problem, dout: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor],
    dk: torch.Tensor, dv: torch.Tensor,
) -> None:  # fmt: skip
    q, k, v, tile = problem.q, problem.k, problem.v, problem.launch.dkdv
    attention_dkdv_kernel[(problem.programs(tile.block_n, keys=True),)](
        q, k, v, dout, *rows, dk, dv, *strides(q, k, v, dout, dk, dv), problem.scale,
        *problem.common, *problem.packed, SCALE=problem.scale_constexpr, **problem.at(tile),
    )  # fmt: skip


def launch_dq(
    problem: Problem, dout: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor],
    dq: torch.Tensor, dbias: torch.Tensor | None,
) -> None:  # fmt: skip
    q, k, v, tile = problem.q, problem.k, problem.v, problem.launch.dq
    attention_dq_kernel[(problem.programs(tile.block_m),)](
        q, k, v, dout, *rows, dq, or_placeholder(dbias, q), *strides(q, k, v, dout, dq),
        problem.scale, *problem.common, *problem.packed, SCALE=problem.scale_constexpr,
        DBIAS=dbias is not None, **problem.at(tile),
    )  # fmt: skip


def launch_dsinks(
    problem: Problem, sinks: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    dsinks = torch.empty_like(sinks)
    attention_dsinks_kernel[(problem.heads,)](
        sinks, *rows, dsinks, problem.batch, problem.heads, problem.queries, BLOCK=512
    )
    return dsinks


_FULL = MASK.value | BIAS.value | RIGHT.value
_CAPPED = SOFTCAP.value | RIGHT.value
_TILES, _BLOCKS = RIGHT.value | TILES.value, RIGHT.value | BLOCKS.value
AOT = (
    *(
        entry(attention_fwd_kernel, label, "bf16", row.limit, row.forward, mode, drop, FOLD=fold)
        for rows, label, mode, drop, fold in (
            (HALF, "plain", 0, False, True),
            (HALF, "causal", RIGHT.value, False, True),
            (HALF_HEAVY, "causal bias mask", _FULL, False, False),
            (HALF_HEAVY[1:2], "causal softcap dropout", _CAPPED, True, False),
            (HALF_HEAVY, "ranges", RANGES.value, False, True),
            (HALF_TILES, "causal blocks of tiles", _TILES, False, True),
            (HALF_HEAVY, "causal blocks", _BLOCKS, False, True),
        )
        for row in rows
    ),
    *(
        entry(attention_fwd_kernel, label, "fp32", row.limit, row.forward, mode, FOLD=True)
        for rows, label, mode in (
            (SINGLE, "causal", RIGHT.value),
            (SINGLE_SPARSE[:1], "ranges", RANGES.value),
            (SINGLE_SPARSE[:1], "causal blocks", _BLOCKS),
        )
        for row in rows
    ),
    *backward_kernels.AOT,
    *bias_kernels.AOT,
)  # fmt: skip
