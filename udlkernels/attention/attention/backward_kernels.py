"""The backward of attention: delta, then dk and dv by blocks of keys, dq by blocks of queries.

Each result has one owner, which walks over what it depends on in order: no atomics, and seven
products where a backward with atomics has five. The gradient of a bias that every head has for
itself is written along with dq; that of a broadcast bias is in bias_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from udlkernels.attention.attention.tile_kernels import (
    ALIBI,
    BIAS,
    HALF,
    HALF_HEAVY,
    LEFT,
    LOG2E,
    MASK,
    PLAIN,
    RIGHT,
    SELECTS,
    SINGLE,
    SOFTCAP,
    clean,
    dot,
    entry,
    kept,
    key_blocks,
    key_length,
    load_tile,
    logits,
    masked_start,
    placed,
    query_blocks,
    store_tile,
    tile_count,
)


@triton.jit
def attention_delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr, dout_b, dout_h, dout_t, out_b, out_h, out_t,
    heads, queries,
    DLSE: tl.constexpr, ACC: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = sum of dout * out over the row - dlse, what each weight's gradient is less."""
    tiles = tl.cdiv(queries, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = unit // heads, unit % heads
    i = first + tl.arange(0, BLOCK_M)
    dout = load_tile(
        dout_ptr + b * dout_b + h * dout_h, dout_t, first, 0, queries, BLOCK_M, BLOCK_DV, DV, True,
        WIDE,
    )  # fmt: skip
    out = load_tile(
        out_ptr + b * out_b + h * out_h, out_t, first, 0, queries, BLOCK_M, BLOCK_DV, DV, True, WIDE
    )
    delta = tl.sum(dout.to(ACC) * out.to(ACC), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + unit * queries + i, mask=i < queries, other=0.0)
    tl.store(delta_ptr + unit * queries + i, delta, mask=i < queries)


@triton.jit
def row_values(lse_ptr, delta_ptr, at, i, queries):
    """lse in base 2 and delta; rows that see nothing or do not exist get weights exp2(-inf) = 0."""
    lse = tl.load(lse_ptr + at + i, mask=i < queries, other=float("-inf"))
    delta = tl.load(delta_ptr + at + i, mask=i < queries, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit
def _gradient(
    s, t, lse, dp, delta, keep, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    MODE: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """The weights as they met the values, the logits' gradient, and that of scale * q k."""
    p = tl.exp2(s - lse)
    dropped = p
    if THRESHOLD > 0:
        dropped = tl.where(keep, p * KEEP_SCALE, 0.0)
        dp = tl.where(keep, dp * KEEP_SCALE, 0.0)
    ds = p * (dp - delta)
    dqk = ds
    if SOFTCAP & MODE:
        dqk = ds * (1.0 - t * t)
    if BOUND or (SELECTS & MODE) != 0:
        ds = tl.where(s == float("-inf"), 0.0, ds)
        dqk = tl.where(s == float("-inf"), 0.0, dqk)
    return dropped, ds, dqk


@triton.jit
def _dkdv_block(
    dk, dv, k, v, start, j, low, high, q_ptr, q_t, dout_ptr, dout_t, lse_ptr, delta_ptr, seed_ptr,
    row, first_key, window, extras, slope, factor, cap,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, MODE: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries joins dk and dv; tiles are [BLOCK_N, BLOCK_M], products need no turn."""
    i = start + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, q_t, start, low, high, BLOCK_M, BLOCK_D, D, True, WIDE)
    lse, delta = row_values(lse_ptr, delta_ptr, row, i, window[0])
    qk = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], dk.dtype))
    s, t = logits(qk, i[None, :], j[:, None], window, extras, slope, factor, cap, MODE, True, True)
    dout = load_tile(dout_ptr, dout_t, start, low, high, BLOCK_M, BLOCK_DV, DV, True, WIDE)
    dp = dot(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], dk.dtype))
    keep = 0
    if THRESHOLD > 0:
        keep = tl.trans(kept(seed_ptr, row + start, first_key, THRESHOLD, BLOCK_M, BLOCK_N))
    p, _, dqk = _gradient(
        s, t, lse[None, :], dp, delta[None, :], keep, THRESHOLD, KEEP_SCALE, MODE, True
    )
    if SELECTS & MODE:
        q = clean(q, s, 0)
        dout = clean(dout, s, 0)
    dv = dot(p.to(dout.dtype), dout, dv)
    dk = dot(dqk.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=PLAIN)
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_t,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, scale,
    mask_ptr, bias_ptr, lengths_ptr, slopes_ptr, seed_ptr,
    mask_b, mask_h, mask_t, mask_s, bias_b, bias_h, bias_t, bias_s,
    heads, group, queries, keys, offset, left, right, factor, cap, cu_q_ptr, cu_k_ptr, samples,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr, CAP: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    MODE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one KV head, over the query heads of its group in order."""
    tiles = tile_count(keys, cu_k_ptr, samples, BLOCK_N)
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    b, kv_head, unit, first, k_start, own, q_start, met = placed(
        tl.program_id(0) % tiles, unit, keys, queries, heads // group, cu_k_ptr, cu_q_ptr, samples,
        BLOCK_N,
    )  # fmt: skip
    rows = queries
    queries, keys = met, own
    if cu_k_ptr is not None:
        offset *= keys - queries
    if ACC == tl.float64:
        factor, cap, scale = FACTOR, CAP, SCALE
    j = first + tl.arange(0, BLOCK_N)
    length = key_length(lengths_ptr, b, keys, MODE)
    window = queries, keys, length, offset, left, right
    k_at = k_ptr + b * k_b + kv_head * k_h + k_start * k_s
    v_at = v_ptr + b * v_b + kv_head * v_h + k_start * v_s
    k = load_tile(k_at, k_s, first, 0, length, BLOCK_N, BLOCK_D, D, True, WIDE)
    v = load_tile(v_at, v_s, first, 0, length, BLOCK_N, BLOCK_DV, DV, True, WIDE)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    low, high, begin, end = query_blocks(first, window, BLOCK_N, BLOCK_M, MODE)
    # One loop with a mask, not two: the code of a second one costs more registers than there are,
    # and so does what LLVM would hoist.
    for member in tl.range(group, disable_licm=True):
        h = kv_head * group + member
        extras = (
            mask_ptr + b * mask_b + h * mask_h, mask_t, mask_s,
            bias_ptr + b * bias_b + h * bias_h, bias_t, bias_s,
        )  # fmt: skip
        slope = 0.0
        if ALIBI & MODE:
            slope = tl.load(slopes_ptr + unit * group + member).to(ACC) * LOG2E
        q_at = q_ptr + b * q_b + h * q_h + q_start * q_t
        dout_at = dout_ptr + b * dout_b + h * dout_h + q_start * dout_t
        row = (b * heads + h) * rows + q_start
        for n in tl.range((end - begin) // BLOCK_M, disable_licm=True):
            dk, dv = _dkdv_block(
                dk, dv, k, v, begin + n * BLOCK_M, j, low, high, q_at, q_t, dout_at, dout_t,
                lse_ptr, delta_ptr, seed_ptr, row, first, window, extras, slope, factor, cap,
                THRESHOLD, KEEP_SCALE, MODE, D, DV, BLOCK_D, BLOCK_DV, WIDE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    valid = (j < length)[:, None]
    dk = tl.where(valid, dk * scale, 0.0)
    dv = tl.where(valid, dv, 0.0)
    dk_at = dk_ptr + b * dk_b + kv_head * dk_h + k_start * dk_s
    dv_at = dv_ptr + b * dv_b + kv_head * dv_h + k_start * dv_s
    store_tile(dk, dk_at, dk_s, first, keys, BLOCK_N, BLOCK_D, D, WIDE)
    store_tile(dv, dv_at, dv_s, first, keys, BLOCK_N, BLOCK_DV, DV, WIDE)


@triton.jit
def score_gradient(
    q, dout, lse, delta, start, i, low, high, k_ptr, k_s, v_ptr, v_s, seed_ptr, first_row,
    window, extras, slope, factor, cap,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, MODE: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of logits and of scale * q k, [BLOCK_M, BLOCK_N], and its keys."""
    k = load_tile(k_ptr, k_s, start, low, high, BLOCK_N, BLOCK_D, D, BOUND, WIDE)
    qk = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], lse.dtype))
    j = start + tl.arange(0, BLOCK_N)
    s, t = logits(qk, i[:, None], j[None, :], window, extras, slope, factor, cap, MODE, True, BOUND)
    v = load_tile(v_ptr, v_s, start, low, high, BLOCK_N, BLOCK_DV, DV, BOUND, WIDE)
    dp = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], lse.dtype))
    keep = 0
    if THRESHOLD > 0:
        keep = kept(seed_ptr, first_row, start, THRESHOLD, BLOCK_M, BLOCK_N)
    _, ds, dqk = _gradient(
        s, t, lse[:, None], dp, delta[:, None], keep, THRESHOLD, KEEP_SCALE, MODE, BOUND
    )
    if SELECTS & MODE:
        k = clean(k, s, 0)
    return ds, dqk, k


@triton.jit
def _dq_block(
    dq, q, dout, lse, delta, start, i, low, high, k_ptr, k_s, v_ptr, v_s, dbias_ptr, seed_ptr,
    first_row, window, extras, slope, factor, cap,
    THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr, MODE: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DBIAS: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """One block of keys joins dq; with DBIAS its gradients are written down."""
    ds, dqk, k = score_gradient(
        q, dout, lse, delta, start, i, low, high, k_ptr, k_s, v_ptr, v_s, seed_ptr, first_row,
        window, extras, slope, factor, cap, THRESHOLD, KEEP_SCALE, MODE, D, DV, BLOCK_D, BLOCK_DV,
        WIDE, BLOCK_M, BLOCK_N, BOUND,
    )  # fmt: skip
    if DBIAS:
        j = start + tl.arange(0, BLOCK_N)
        at = dbias_ptr + i.to(tl.int64)[:, None] * window[1] + j[None, :]
        inside = (i < window[0])[:, None] & (j < window[1])[None, :]
        tl.store(at, ds.to(dbias_ptr.dtype.element_ty), mask=inside)
    return dot(dqk.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=PLAIN)
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_t, dq_b, dq_h, dq_t, scale,
    mask_ptr, bias_ptr, lengths_ptr, slopes_ptr, seed_ptr,
    mask_b, mask_h, mask_t, mask_s, bias_b, bias_h, bias_t, bias_s,
    heads, group, queries, keys, offset, left, right, factor, cap, cu_q_ptr, cu_k_ptr, samples,
    SCALE: tl.constexpr, DBIAS: tl.constexpr,
    FACTOR: tl.constexpr, CAP: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    MODE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head; with DBIAS the bias's gradient too, where it is not 0."""
    tiles = tile_count(queries, cu_q_ptr, samples, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if RIGHT & MODE:
        tile = tiles - 1 - tile
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
        factor, cap, scale = FACTOR, CAP, SCALE
    i = first + tl.arange(0, BLOCK_M)
    window = queries, keys, key_length(lengths_ptr, b, keys, MODE), offset, left, right
    extras = (
        mask_ptr + b * mask_b + h * mask_h, mask_t, mask_s,
        bias_ptr + b * bias_b + h * bias_h, bias_t, bias_s,
    )  # fmt: skip
    slope = 0.0
    if ALIBI & MODE:
        slope = tl.load(slopes_ptr + unit).to(ACC) * LOG2E
    q_ptr += b * q_b + h * q_h + q_start * q_t
    k_ptr += b * k_b + h // group * k_h + k_start * k_s
    v_ptr += b * v_b + h // group * v_h + k_start * v_s
    dout_ptr += b * dout_b + h * dout_h + q_start * dout_t
    if DBIAS:
        dbias_ptr += unit * queries * keys
    q = load_tile(q_ptr, q_t, first, 0, queries, BLOCK_M, BLOCK_D, D, True, WIDE)
    dout = load_tile(dout_ptr, dout_t, first, 0, queries, BLOCK_M, BLOCK_DV, DV, True, WIDE)
    lse, delta = row_values(lse_ptr, delta_ptr, row, i, queries)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)

    low, high, begin, full_begin, full_end, end = key_blocks(first, window, BLOCK_M, BLOCK_N, MODE)
    for n in range((full_end - full_begin) // BLOCK_N):
        dq = _dq_block(
            dq, q, dout, lse, delta, full_begin + n * BLOCK_N, i, low, high, k_ptr, k_s, v_ptr, v_s,
            dbias_ptr, seed_ptr, row + first, window, extras, slope, factor, cap, THRESHOLD,
            KEEP_SCALE, MODE, D, DV, BLOCK_D, BLOCK_DV, WIDE, BLOCK_M, BLOCK_N, DBIAS, False,
        )  # fmt: skip
    for n in range((full_begin - begin + end - full_end) // BLOCK_N):
        start = masked_start(n, begin, full_begin, full_end, BLOCK_N, (LEFT & MODE) != 0)
        dq = _dq_block(
            dq, q, dout, lse, delta, start, i, low, high, k_ptr, k_s, v_ptr, v_s,
            dbias_ptr, seed_ptr, row + first, window, extras, slope, factor, cap, THRESHOLD,
            KEEP_SCALE, MODE, D, DV, BLOCK_D, BLOCK_DV, WIDE, BLOCK_M, BLOCK_N, DBIAS, True,
        )  # fmt: skip
    dq_at = dq_ptr + b * dq_b + h * dq_h + q_start * dq_t
    store_tile(dq * scale, dq_at, dq_t, first, queries, BLOCK_M, BLOCK_D, D, WIDE)


@triton.jit
def attention_dsinks_kernel(
    sinks_ptr, lse_ptr, delta_ptr, dsinks_ptr, batch, heads, queries, BLOCK: tl.constexpr
):
    """dsinks[h] = -sum over samples and queries of the sink's weight times delta."""
    h = tl.program_id(0).to(tl.int64)
    sink = tl.load(sinks_ptr + h)
    total = tl.zeros([BLOCK], lse_ptr.dtype.element_ty)
    for b in range(batch):
        for n in range(tl.cdiv(queries, BLOCK)):
            i = n * BLOCK + tl.arange(0, BLOCK)
            at = (b * heads + h) * queries + i
            lse = tl.load(lse_ptr + at, mask=i < queries, other=float("inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            delta = tl.load(delta_ptr + at, mask=i < queries, other=0.0)
            total -= tl.exp2((sink - lse) * LOG2E) * delta
    tl.store(dsinks_ptr + h, tl.sum(total, 0))


_FULL = MASK.value | BIAS.value | RIGHT.value
_CAPPED = SOFTCAP.value | RIGHT.value
_LAUNCHES = (
    ("bf16", HALF, "plain", 0, False),
    ("bf16", HALF, "causal", RIGHT.value, False),
    ("bf16", HALF_HEAVY, "causal bias mask", _FULL, False),
    ("bf16", HALF_HEAVY[1:2], "causal softcap dropout", _CAPPED, True),
    ("fp32", SINGLE[:2], "causal", RIGHT.value, False),
)
AOT = (
    *(
        made
        for dtype, rows, label, mode, drop in _LAUNCHES
        for row in rows
        for made in (
            entry(attention_dkdv_kernel, label, dtype, row.limit, row.dkdv, mode, drop, SCALE=0.0),
            entry(attention_dq_kernel, label, dtype, row.limit, row.dq, mode, drop, SCALE=0.0,
                  DBIAS=BIAS.value & mode != 0),
        )
    ),
)  # fmt: skip
