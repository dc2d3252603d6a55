"""Attention over a cache on a GPU: new keys are written, chunks of keys attended, chunks merged.

A program of the middle step owns one chunk of CHUNK keys of one KV head and all queries that share
that head, so that a key is read once for a group. What a chunk gives depends on its keys alone, and
chunks are counted from the first key: neither the batch, the capacity nor the paging changes a bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry
from udlkernels.attention.attention.launch_tables import ALIBI, LEFT, RIGHT, SINKS, SOFTCAP, Tile
from udlkernels.attention.attention.sdpa import result
from udlkernels.attention.attention.tile_kernels import (
    LN2,
    LOG2E,
    dot,
    entry,
    logits,
    padded,
    strides,
)

CHUNK = tl.constexpr(512)
# Launches that differ in these alone share their code.
PLAIN = [
    "heads", "group", "queries", "news", "chunks", "capacity", "page_size", "pages", "table_width",
    "positions", "left", "right",
]  # fmt: skip
# (widest head, tile of up to 16 rows, tile of more): a row is a query of one head. Reading keys is
# the limit, so sizes only have to keep loads in flight without spills.
HALF = (
    (64, Tile(16, 64, 4, 3), Tile(64, 64, 8, 3)),
    (128, Tile(16, 64, 4, 3), Tile(64, 64, 8, 3)),
    (256, Tile(16, 64, 8, 2), Tile(32, 32, 4, 2)),
    (512, Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
)
SINGLE = (
    (64, Tile(16, 32, 4, 2), Tile(32, 32, 4, 2)),
    (128, Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    (256, Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (512, Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
)
DOUBLE = ((512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),)
MERGE_BLOCK = 16
APPEND_BLOCK = 8


def pick(dtype: torch.dtype, width: int, rows: int) -> Tile:
    table = {8: DOUBLE, 4: SINGLE}.get(dtype.itemsize, HALF)
    few, many = next(tiles for limit, *tiles in table if width <= limit)
    return few if rows <= few.block_m else many


@triton.jit
def _load_rows(
    at, valid, position, cos_ptr, sin_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HALF_R: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Rows at the addresses `at`, [ROWS, BLOCK_D], their first 2 HALF_R elements rotated."""
    col = tl.arange(0, BLOCK_D)
    x = tl.load(at[:, None] + col[None, :], mask=valid[:, None] & (col < D)[None, :], other=0.0)
    if cos_ptr is not None:
        if INTERLEAVED:
            partner, angle, first = col ^ 1, col // 2, col % 2 == 0
        else:
            first = col < HALF_R
            partner = tl.where(first, col + HALF_R, col - HALF_R)
            angle = tl.where(first, col, col - HALF_R)
        mask = valid[:, None] & (col < 2 * HALF_R)[None, :]
        place = position.to(tl.int64)[:, None] * HALF_R + angle[None, :]
        cos = tl.load(cos_ptr + place, mask=mask, other=1.0)
        sin = tl.load(sin_ptr + place, mask=mask, other=0.0)
        other = tl.load(at[:, None] + partner[None, :], mask=mask, other=0.0).to(ACC) * sin
        turned = x.to(ACC) * cos + tl.where(first[None, :], -other, other)
        x = turned.to(at.dtype.element_ty)
    return x


@triton.jit
def _row_offsets(j, valid, b, cache_b, cache_s, table_ptr, table_width, page_size, pages):
    """Where keys j of sample b lie from the start of their head, as 64-bit offsets."""
    if table_ptr is not None:
        page = tl.load(table_ptr + b * table_width + j // page_size, mask=valid, other=0)
        page = tl.maximum(tl.minimum(page, pages - 1), 0)
        return page * cache_b + (j % page_size).to(tl.int64) * cache_s
    else:
        return b * cache_b + j.to(tl.int64) * cache_s


@triton.jit(do_not_specialize=PLAIN)
def attention_decode_append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, cos_ptr, sin_ptr,
    k_cache_b, k_cache_h, k_cache_s, v_cache_b, v_cache_h, v_cache_s,
    k_b, k_h, k_s, v_b, v_h, v_s, heads, news, capacity, page_size, pages, table_width, positions,
    ACC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HALF_R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_M heads of one new key and value; here lengths are those before the write."""
    blocks = tl.cdiv(heads, BLOCK_M)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    b, t = token // news, token % news
    head = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.load(lengths_ptr + b) + t
    inside = (j >= 0) & (j < capacity)
    valid = (head < heads) & inside
    row = _row_offsets(
        j, inside, b, k_cache_b, k_cache_s, table_ptr, table_width, page_size, pages
    )  # fmt: skip
    head = head.to(tl.int64)
    position = tl.maximum(tl.minimum(j, positions - 1), 0) + head * 0
    k = _load_rows(
        k_ptr + b * k_b + t * k_s + head * k_h, valid, position, cos_ptr, sin_ptr, D, BLOCK_D,
        HALF_R, INTERLEAVED, ACC,
    )  # fmt: skip
    col = tl.arange(0, BLOCK_D)
    at = k_cache_ptr + row + (head * k_cache_h)[:, None] + col[None, :]
    tl.store(at, k, mask=valid[:, None] & (col < D)[None, :])
    row = _row_offsets(
        j, inside, b, v_cache_b, v_cache_s, table_ptr, table_width, page_size, pages
    )  # fmt: skip
    v = _load_rows(
        v_ptr + b * v_b + t * v_s + head * v_h, valid, position, None, None, DV, BLOCK_DV, 0,
        False, ACC,
    )  # fmt: skip
    col = tl.arange(0, BLOCK_DV)
    at = v_cache_ptr + row + (head * v_cache_h)[:, None] + col[None, :]
    tl.store(at, v, mask=valid[:, None] & (col < DV)[None, :])


@triton.jit(do_not_specialize=PLAIN)
def attention_decode_chunk_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, cos_ptr, sin_ptr, slopes_ptr, parts_ptr,
    part_lse_ptr, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s,
    heads, group, queries, chunks, capacity, page_size, pages, table_width, positions, left, right,
    factor, cap,
    FACTOR: tl.constexpr, CAP: tl.constexpr, MODE: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HALF_R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What one chunk of keys gives to BLOCK_M queries of a KV head, and the logarithm in base 2."""
    chunk = tl.program_id(0) % chunks
    row_tiles = tl.cdiv(group * queries, BLOCK_M)
    row_tile = tl.program_id(0) // chunks % row_tiles
    unit = (tl.program_id(0) // chunks // row_tiles).to(tl.int64)
    b, kv_head = unit // (heads // group), unit % (heads // group)
    length = tl.load(lengths_ptr + b)
    length = tl.maximum(tl.minimum(length, capacity), 0).to(tl.int32)
    start = chunk * CHUNK
    if start >= length:
        return
    if ACC == tl.float64:
        factor, cap = FACTOR, CAP
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < group * queries
    h = kv_head * group + row // queries
    i = tl.where(valid, row % queries, queries)
    position = tl.maximum(tl.minimum(length - queries + i, positions - 1), 0)
    q = _load_rows(
        q_ptr + b * q_b + h * q_h + i.to(tl.int64) * q_t, valid, position, cos_ptr, sin_ptr,
        D, BLOCK_D, HALF_R, INTERLEAVED, ACC,
    )  # fmt: skip
    slope = tl.zeros([BLOCK_M, 1], ACC)
    if ALIBI & MODE:
        slope = tl.load(slopes_ptr + b * heads + h, mask=valid, other=0.0).to(ACC)[:, None] * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], float("-inf"), ACC)
    low = start
    if LEFT & MODE:
        low = tl.maximum(length - queries - left, start)
    high = tl.minimum(start + CHUNK, length)
    window = queries, capacity, length, length - queries, left, right
    extras = 0, 0, 0, 0, 0, 0
    col, v_col = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k_ptr += kv_head * k_h
    v_ptr += kv_head * v_h
    begin = low // BLOCK_N * BLOCK_N
    for n in range(tl.cdiv(tl.maximum(high - begin, 0), BLOCK_N)):
        j = begin + n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (j >= low) & (j < high)
        at = _row_offsets(j, inside, b, k_b, k_s, table_ptr, table_width, page_size, pages)
        k = tl.load(k_ptr + (at[:, None] + col), mask=inside[:, None] & (col < D), other=0.0)
        qk = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], ACC))
        s, _ = logits(
            qk, i[:, None], j[None, :], window, extras, slope, factor, cap, MODE, True, True
        )
        new_peak = tl.maximum(peak, tl.max(s, 1))
        against = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s - against[:, None])
        shrink = tl.exp2(peak - against)
        total = total * shrink + tl.sum(p, 1)
        at = _row_offsets(j, inside, b, v_b, v_s, table_ptr, table_width, page_size, pages)
        v = tl.load(v_ptr + (at[:, None] + v_col), mask=inside[:, None] & (v_col < DV), other=0.0)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        peak = new_peak
    divisor = tl.where(total == 0.0, 1.0, total)
    place = ((b * heads + h) * queries + i) * chunks + chunk
    lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(divisor))
    tl.store(part_lse_ptr + place, lse, mask=valid)
    seen = valid & (lse != float("-inf"))
    part = acc * (1.0 / divisor)[:, None]
    tl.store(parts_ptr + place[:, None] * DV + v_col, part, mask=seen[:, None] & (v_col < DV))


@triton.jit(do_not_specialize=PLAIN)
def attention_decode_merge_kernel(
    parts_ptr, part_lse_ptr, lengths_ptr, sinks_ptr, out_ptr, lse_ptr, out_b, out_h, out_t,
    heads, queries, chunks, capacity,
    MODE: tl.constexpr, ACC: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One query's chunks, weighed by their logarithms; chunks without keys are not read."""
    row = tl.program_id(0).to(tl.int64)
    t, h, b = row % queries, row // queries % heads, row // queries // heads
    count = tl.cdiv(tl.maximum(tl.minimum(tl.load(lengths_ptr + b), capacity), 0), CHUNK)
    peak = tl.full([1], float("-inf"), ACC)
    if SINKS & MODE:
        sink = tl.load(sinks_ptr + h).to(ACC) * LOG2E
        peak = tl.zeros([1], ACC) + sink
    for n in range(tl.cdiv(count, BLOCK_N)):
        c = n * BLOCK_N + tl.arange(0, BLOCK_N)
        part_lse = tl.load(part_lse_ptr + row * chunks + c, mask=c < count, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(part_lse, 0))
    against = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([1], ACC)
    if SINKS & MODE:
        total += tl.exp2(sink - against)
    acc = tl.zeros([BLOCK_DV], ACC)
    col = tl.arange(0, BLOCK_DV)
    for n in range(tl.cdiv(count, BLOCK_N)):
        c = n * BLOCK_N + tl.arange(0, BLOCK_N)
        part_lse = tl.load(part_lse_ptr + row * chunks + c, mask=c < count, other=float("-inf"))
        weight = tl.exp2(part_lse - against)
        seen = (part_lse != float("-inf"))[:, None] & (col < DV)[None, :]
        at = parts_ptr + (row * chunks + c)[:, None] * DV + col[None, :]
        acc += tl.sum(tl.load(at, mask=seen, other=0.0) * weight[:, None], 0)
        total += tl.sum(weight, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    at = out_ptr + b * out_b + h * out_h + t * out_t + col
    tl.store(at, (acc / divisor).to(out_ptr.dtype.element_ty), mask=col < DV)
    lse = tl.where(total == 0.0, float("-inf"), (against + tl.log2(divisor)) * LN2)
    tl.store(lse_ptr + row + tl.arange(0, 1), lse)


def _places(
    cache: torch.Tensor, block_table: torch.Tensor | None, cos: torch.Tensor | None
) -> dict[str, int]:
    """Where keys may lie, in numbers."""
    pages, _, page_size, _ = cache.shape
    width = 1 if block_table is None else block_table.shape[1]
    return dict(
        capacity=page_size * width, page_size=page_size, pages=pages, table_width=width,
        positions=1 if cos is None else cos.shape[0],
    )  # fmt: skip


def _constexprs(
    k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, interleaved: bool
) -> dict[str, Any]:
    width, v_width = k.shape[3], v.shape[3]
    return dict(
        ACC=tl.float64 if k.dtype == torch.float64 else tl.float32, D=width, DV=v_width,
        BLOCK_D=padded(width), BLOCK_DV=padded(v_width),
        HALF_R=0 if cos is None else cos.shape[1], INTERLEAVED=interleaved,
    )  # fmt: skip


def attention_decode_append_(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor,
    starts: torch.Tensor, block_table: torch.Tensor | None, cos: torch.Tensor | None,
    sin: torch.Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    batch, heads, count, _ = k_new.shape
    programs = batch * count * triton.cdiv(heads, APPEND_BLOCK)
    if programs == 0 or k_cache.numel() == 0:
        return
    attention_decode_append_kernel[(programs,)](
        k_cache, v_cache, k_new, v_new, starts, block_table, cos, sin,
        *strides(k_cache, v_cache, k_new, v_new), heads, count,
        **_places(k_cache, block_table, cos), **_constexprs(k_cache, v_cache, cos, interleaved),
        BLOCK_M=APPEND_BLOCK, num_warps=4,
    )  # fmt: skip


def attention_decode_fwd(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
    block_table: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None,
    interleaved: bool, alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None, left: int,
    right: int, scale: float, softcap: float, heads_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, heads, queries, width = q.shape
    kv_heads, v_width = k_cache.shape[1], v_cache.shape[3]
    group = heads // kv_heads
    places = _places(k_cache, block_table, cos)
    capacity = places["capacity"]
    chunks = triton.cdiv(capacity, CHUNK.value)
    double = q.dtype == torch.float64
    wide = torch.float64 if double else torch.float32
    out = result(q, v_width, heads_last)
    lse = q.new_empty(q.shape[:3], dtype=wide)
    parts = q.new_empty((batch, heads, queries, chunks, v_width), dtype=wide)
    part_lse = q.new_empty((batch, heads, queries, chunks), dtype=wide)
    given = (
        (ALIBI, alibi_slopes is not None), (SOFTCAP, softcap > 0.0), (SINKS, sinks is not None),
        (LEFT, left < capacity - 1), (RIGHT, right < queries - 1),
    )  # fmt: skip
    mode = sum(bit.value for bit, has in given if has)
    factor, cap = (scale / softcap, softcap * LOG2E.value) if softcap > 0.0 else (
        scale * LOG2E.value, 0.0
    )  # fmt: skip
    known = _constexprs(k_cache, v_cache, cos, interleaved)
    tile = pick(q.dtype, max(width, v_width), group * queries)
    row_tiles = triton.cdiv(group * queries, tile.block_m)
    reach = capacity + queries
    attention_decode_chunk_kernel[(chunks * row_tiles * batch * kv_heads,)](
        q, k_cache, v_cache, lengths, block_table, cos, sin, alibi_slopes, parts, part_lse,
        *strides(q, k_cache, v_cache), heads, group, queries, chunks, **places,
        left=min(left, reach), right=min(right, reach), factor=factor, cap=cap,
        FACTOR=factor if double else 0.0, CAP=cap if double else 0.0, MODE=mode, **known,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    attention_decode_merge_kernel[(batch * heads * queries,)](
        parts, part_lse, lengths, sinks, out, lse, *strides(out), heads, queries, chunks, capacity,
        MODE=mode, ACC=known["ACC"], DV=v_width, BLOCK_DV=known["BLOCK_DV"], BLOCK_N=MERGE_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out, lse


_NONE: dict[str, Any] = dict(table_ptr=None, cos_ptr=None, sin_ptr=None, slopes_ptr=None, HALF_R=0)
_ALL = ALIBI.value | SOFTCAP.value | SINKS.value | LEFT.value | RIGHT.value


def _chunk_entry(dtype: str, width: int, tile: Tile, full: bool) -> Entry:
    rotary: dict[str, Any] = dict(HALF_R=width // 2) if full else _NONE
    label = f"{'paged, all options' if full else 'contiguous'}, {tile.block_m} rows"
    return entry(
        attention_decode_chunk_kernel, label, dtype, width, tile, _ALL if full else 0,
        plain=PLAIN, INTERLEAVED=False, **rotary,
    )  # fmt: skip


_MERGE = Tile(1, MERGE_BLOCK, 4, 2)
_APPEND = Tile(APPEND_BLOCK, 1, 4, 2)
AOT = (
    *(
        _chunk_entry(dtype, width, tile, full)
        for dtype, table in (("bf16", HALF), ("fp32", SINGLE))
        for width, *tiles in table
        for tile in dict.fromkeys(tiles)
        for full in (False, True)
    ),
    *(
        entry(attention_decode_merge_kernel, label, "bf16", width, _MERGE, mode, plain=PLAIN)
        for width in (128, 512)
        for label, mode in (("plain", 0), ("sinks", SINKS.value))
    ),
    *(
        entry(attention_decode_append_kernel, label, "bf16", width, _APPEND, 0, plain=PLAIN,
              INTERLEAVED=label == "interleaved", **special)
        for width in (128, 512)
        for label, special in (("plain", _NONE), ("interleaved", dict(HALF_R=width // 2)))
    ),
)  # fmt: skip
