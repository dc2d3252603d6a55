"""What the attention kernels share: tiles, block ranges, logits, dropout, and their arguments.

Positions inside one head are 32-bit numbers, offsets between heads and blocks 64-bit ones. Logits
are in base 2 (log2(e) is part of `factor`, `cap`, the slope and the bias), so that a weight is one
`exp2`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry
from udlkernels._philox import threshold
from udlkernels.attention.attention.launch_tables import (
    ALIBI,
    BIAS,
    HEAVY,
    LEFT,
    LENGTHS,
    MASK,
    RIGHT,
    SINKS,
    SOFTCAP,
    TARGETS,
    WIDE_STRIDE,
    Tile,
    pick,
    tiles_fit,
)
from udlkernels.attention.attention.sparse_kernels import BLOCKS, RANGES, TILES, in_range, narrowed
from udlkernels.normalization._row_kernels import dropout_keeps

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    base, stride, first, low, high, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    BOUND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows first, first + 1, ... of a matrix, [ROWS, COLS]; zeros from column WIDTH on.

    With BOUND rows outside of [low, high) are zeros too, and what memory holds there is not read.
    """
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    within = row.to(tl.int64) if WIDE else row
    at = base + first.to(tl.int64) * stride + (within[:, None] * stride + col[None, :])
    inside = (first + row >= low) & (first + row < high)
    if BOUND:
        if WIDTH == COLS:
            return tl.load(at, mask=inside[:, None], other=0.0)
        else:
            return tl.load(at, mask=inside[:, None] & (col < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == COLS:
            return tl.load(at)
        else:
            return tl.load(at, mask=(col < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(
    tile, base, stride, first, high, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    within = row.to(tl.int64) if WIDE else row
    at = base + first.to(tl.int64) * stride + (within[:, None] * stride + col[None, :])
    mask = (first + row < high)[:, None] & (col < WIDTH)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc):
    """acc + a b in full precision of the inputs' type."""
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def tanh(x):
    """By a series near 0, where the quotient of exponentials would cancel (Cephes' constants)."""
    size = tl.abs(x)
    square = x * x
    if x.dtype == tl.float64:
        top = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square
        bottom = (square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3
        bottom = bottom * square + 4.84406305325125486048e3
        series = (top - 1.61468768441708447952e3) / bottom
    else:
        series = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
        series = (series * square + 1.33314422036e-1) * square - 3.33332819422e-1
    e = tl.exp(-2.0 * size)
    result = tl.where(size < 0.625, size + size * square * series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -result, result)


@triton.jit
def key_length(lengths_ptr, b, keys, MODE: tl.constexpr):
    """How many keys sample b has."""
    if LENGTHS & MODE:
        length = tl.load(lengths_ptr + b)
        return tl.maximum(tl.minimum(length, keys), 0).to(tl.int32)
    else:
        return keys


@triton.jit
def tile_count(rows, cu_ptr, samples, BLOCK: tl.constexpr):
    """How many tiles a head has; packed sequences leave up to one each unused."""
    if cu_ptr is None:
        return tl.cdiv(rows, BLOCK)
    else:
        return rows // BLOCK + samples + 1


@triton.jit
def placed(
    tile, unit, own, other, heads, cu_own_ptr, cu_other_ptr, samples, BLOCK: tl.constexpr
):  # fmt: skip
    """Where a tile of queries (or keys) lies: own are its rows, other those that they meet.

    Gives the sample and head, that of the slopes, the tile's first row, and the start and count of
    the sample's own and other rows. Packed sequences have number floor(start / BLOCK) + b for their
    first tile, which leaves room for all and grows with b: the owner of a tile is found by
    counting. Rows behind the last sequence are one more of them, which meets nothing.
    """
    if cu_own_ptr is None:
        zero = unit * 0
        return unit // heads, unit % heads, unit, tile * BLOCK, zero, own, zero, other
    else:
        b = tl.program_id(0) * 0
        above = b + samples + 1
        while above - b > 1:
            middle = (b + above) // 2
            before = tl.load(cu_own_ptr + middle) // BLOCK + middle <= tile
            b = tl.where(before, middle, b)
            above = tl.where(before, above, middle)
        within = b < samples
        start = _bounded(tl.load(cu_own_ptr + b), 0, own)
        last = tl.load(cu_own_ptr + b + 1, mask=within, other=own)
        count = (_bounded(last, start, own) - start).to(tl.int32)
        first = (tile - (start // BLOCK + b)).to(tl.int32) * BLOCK
        other_start = _bounded(tl.load(cu_other_ptr + b), 0, other)
        last = tl.load(cu_other_ptr + b + 1, mask=within, other=0)
        met = (_bounded(last, other_start, other) - other_start).to(tl.int32)
        met = tl.where(within, met, 0)
        return unit * 0, unit, b * heads + unit, first, start, count, other_start, met


@triton.jit
def _bounded(x, low, high):
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def _blocks(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Block starts: all of [low, high) lies in begin to end, what needs no mask in between."""
    begin = low // BLOCK * BLOCK
    end = tl.where(high > low, tl.cdiv(tl.maximum(high, 0), BLOCK) * BLOCK, begin)
    full_begin = tl.minimum(tl.cdiv(full_low, BLOCK) * BLOCK, end)
    full_end = tl.minimum(tl.maximum(full_high, 0) // BLOCK * BLOCK, end)
    return low, high, begin, full_begin, tl.maximum(full_begin, full_end), end


@triton.jit
def key_blocks(first, window, ROWS: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr):
    """Which keys the queries first ... first + ROWS see: `_blocks`."""
    queries, keys, length, offset, left, right = window[:6]
    last = tl.minimum(first + ROWS, queries) - 1
    low, full_low = first * 0, first * 0
    high = length + first * 0
    full_high = high
    if LEFT & MODE:
        low = tl.maximum(first + offset - left, 0)
        full_low = tl.maximum(last + offset - left, 0)
    if RIGHT & MODE:
        high = tl.minimum(length, last + offset + right + 1)
        full_high = tl.minimum(length, first + offset + right + 1)
    if RANGES & MODE:
        low, high, full_low, full_high = narrowed(
            low, high, full_low, full_high, window[6], window[7], keys
        )
    if BLOCKS & MODE:  # any block may need the mask
        full_low, full_high = low, low
    return _blocks(low, high, full_low, full_high, BLOCK)


@triton.jit
def query_blocks(first, window, COLS: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr):
    """[low, high) see any of the keys first ... first + COLS; block starts begin to end."""
    queries, _, length, offset, left, right = window[:6]
    last = tl.minimum(first + COLS, length) - 1
    low = first * 0
    high = queries + low
    if RIGHT & MODE:
        low = tl.maximum(first - offset - right, 0)
    if LEFT & MODE:
        high = tl.minimum(queries, last - offset + left + 1)
    high = tl.where(first < length, high, 0)
    low, high, begin, _full_begin, _full_end, end = _blocks(low, high, low, high, BLOCK)
    return low, high, begin, end


@triton.jit
def masked_start(n, begin, full_begin, full_end, BLOCK: tl.constexpr, BEFORE: tl.constexpr):
    """The n-th block that needs a mask; only with BEFORE are there any in front of the others."""
    if BEFORE:
        before = (full_begin - begin) // BLOCK
        return tl.where(n < before, begin + n * BLOCK, full_end + (n - before) * BLOCK)
    else:
        return full_end + n * BLOCK


@triton.jit
def logits(
    qk, i, j, window, extras, slope, factor, cap, MODE: tl.constexpr, SCALED: tl.constexpr,
    BOUND: tl.constexpr, seen=0,
):  # fmt: skip
    """Logits in base 2 of a tile of q k, -inf where masked; and tanh, with SOFTCAP.

    i, j: the tile's queries and keys, along either axis; seen: what `blocks_seen` left of it.
    BOUND: window, key length and ranges cut the tile.
    """
    queries, keys, length, offset, left, right = window[:6]
    mask_ptr, mask_t, mask_s, bias_ptr, bias_t, bias_s = extras[:6]
    s = qk
    if SCALED:
        s = qk * factor
    t = s
    if SOFTCAP & MODE:
        t = tanh(s)
        s = t * cap
    distance = j - i - offset
    if ALIBI & MODE:
        s -= slope * tl.abs(distance).to(s.dtype)
    inside = (i < queries) & (j < keys)
    if BIAS & MODE:
        at = bias_ptr + i.to(tl.int64) * bias_t + j.to(tl.int64) * bias_s
        bias = tl.load(at, mask=inside, other=float("-inf")).to(s.dtype)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias * LOG2E)
    if MASK & MODE:
        at = mask_ptr + i.to(tl.int64) * mask_t + j.to(tl.int64) * mask_s
        s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, float("-inf"))
    if BLOCKS & MODE:
        s = tl.where(seen != 0, s, float("-inf"))
    if BOUND:
        visible = (j < length) & (i < queries)
        if LEFT & MODE:
            visible &= distance >= -left
        if RIGHT & MODE:
            visible &= distance <= right
        if RANGES & MODE:
            visible &= in_range(i, j, window[6], window[7])
        s = tl.where(visible, s, float("-inf"))
    return s, t


@triton.jit
def clean(tile, s, AXIS: tl.constexpr):
    """Rows of a tile (keys or queries) that nobody across AXIS of the logits sees, as zeros.

    A weight of 0 does not silence a NaN in a matrix product. What remains: a row with NaN that some
    of the tile's partners see reaches all partners of that tile.
    """
    peak = tl.max(s, AXIS)  # may pass over NaN, whose weights are NaN and show without this row
    return tl.where((peak > float("-inf"))[:, None], tile, 0.0).to(tile.dtype)


@triton.jit
def kept(
    seed_ptr, first_row, start, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Which weights dropout keeps, [ROWS, COLS]: generator rows from first_row, keys from start."""
    row = first_row + tl.arange(0, ROWS)
    group = start // 4 + tl.arange(0, COLS // 4)
    return dropout_keeps(seed_ptr, row[:, None], group[None, :], THRESHOLD)


class Problem:
    """The arguments that forward and backward pass to their kernels alike."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
        bias: torch.Tensor | None, key_lengths: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None,
        ranges: torch.Tensor | None, block_mask: torch.Tensor | None, block_size: int, offset: int,
        left: int, right: int, scale: float, softcap: float, dropout_p: float,
        seed: torch.Tensor | None,
        cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """cu_seqlens: of q and k, where they are one sample that holds packed sequences."""
        self.batch, self.heads, self.queries, self.width = q.shape
        self.kv_heads, self.keys, self.v_width = k.shape[1], k.shape[2], v.shape[3]
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.double = q.dtype == torch.float64
        self.acc = torch.float64 if self.double else torch.float32
        # Distances j - i - offset reach from 1 - queries - offset to keys - 1 - offset.
        behind, ahead = self.queries - 1 + offset, self.keys - 1 - offset
        self.packed: tuple[Any, Any, int] = (None, None, 0)
        if cu_seqlens is not None:  # whose offsets and lengths only the device knows
            behind = ahead = self.queries + self.keys
            self.packed = (*cu_seqlens, len(cu_seqlens[0]) - 1)
        given = (
            (MASK, mask is not None), (BIAS, bias is not None), (ALIBI, alibi_slopes is not None),
            (SOFTCAP, softcap > 0.0), (LENGTHS, key_lengths is not None),
            (SINKS, sinks is not None), (RANGES, ranges is not None),
            (LEFT, left < behind), (RIGHT, right < ahead),
        )  # fmt: skip
        self.mode = sum(bit.value for bit, has in given if has)
        drops = dropout_p > 0.0 and seed is not None
        width = max(self.width, self.v_width)
        if block_mask is not None:
            whole = not (drops or self.mode & HEAVY) and tiles_fit(q.dtype, width, block_size)
            self.mode |= TILES.value if whole else BLOCKS.value
        self.launch = pick(q.dtype, width, self.mode, drops, cu_seqlens is not None)
        factor, cap = (scale / softcap, softcap) if softcap > 0.0 else (scale, 0.0)
        factor, cap = factor * (1.0 if softcap > 0.0 else LOG2E.value), cap * LOG2E.value
        # A scaled row maximum is the maximum of the scaled row, and one multiplication less, where
        # the factor is positive and nothing is added to the product.
        masks = MASK.value | RANGES.value | BLOCKS.value | TILES.value
        masks |= LENGTHS.value | LEFT.value | RIGHT.value | SINKS.value
        self.scale_constexpr = scale if self.double else 0.0
        self.fold = factor > 0.0 and not self.mode & ~masks
        mask_bytes = q if mask is None else mask.view(torch.uint8)
        bias_values = q if bias is None else bias
        mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        bias_strides = (0, 0, 0, 0) if bias is None else bias.stride()
        blocks = q if block_mask is None else block_mask.view(torch.uint8)
        blocks_strides = (0, 0, 0, 0) if block_mask is None else block_mask.stride()
        reach = self.queries + self.keys + abs(offset)
        self.common = (
            mask_bytes, bias_values, *(or_placeholder(t, q) for t in (key_lengths, alibi_slopes)),
            or_placeholder(seed, q), or_placeholder(ranges, q), blocks,
            0 if ranges is None else ranges.stride(0), *blocks_strides, block_size,
            *mask_strides, *bias_strides, self.heads, self.heads // self.kv_heads,
            self.queries, self.keys, offset,
            min(max(left, -reach), reach), min(max(right, -reach), reach), factor, cap,
        )  # fmt: skip
        largest = max(t.stride(2) for t in (q, k, v))
        self.constexprs: dict[str, Any] = dict(
            FACTOR=factor if self.double else 0.0, CAP=cap if self.double else 0.0,
            THRESHOLD=threshold(dropout_p) if drops else 0,
            KEEP_SCALE=1.0 / (1.0 - dropout_p) if drops and dropout_p < 1.0 else float(not drops),
            MODE=self.mode, ACC=tl.float64 if self.double else tl.float32, D=self.width,
            DV=self.v_width, BLOCK_D=padded(self.width), BLOCK_DV=padded(self.v_width),
            WIDE=largest >= WIDE_STRIDE,
        )  # fmt: skip

    def programs(self, block: int, keys: bool = False) -> int:
        """Tiles of `block` queries of all heads, or of `block` keys of all KV heads."""
        rows, heads = (self.keys, self.kv_heads) if keys else (self.queries, self.heads)
        if self.packed[0] is None:
            return triton.cdiv(rows, block) * self.batch * heads
        return (rows // block + self.packed[2] + 1) * heads  # as tile_count

    def at(self, tile: Tile) -> dict[str, Any]:
        """Keyword arguments of a launch with this tile."""
        return dict(
            self.constexprs, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip


def or_placeholder(tensor: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A pointer argument that the kernel will not read still has to be some tensor."""
    return placeholder if tensor is None else tensor


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Strides of sample, head and position of each."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


_OWN_TYPE = (
    dict.fromkeys(("lengths_ptr", "seed_ptr", "table_ptr", "cu_q_ptr", "cu_k_ptr"), "*i64")
    | dict.fromkeys(("lse_ptr", "delta_ptr", "slopes_ptr", "sinks_ptr"), "*fp32")
    | dict.fromkeys(("parts_ptr", "part_lse_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    | {"mask_ptr": "*u8", "ranges_ptr": "*i64", "blocks_ptr": "*u8"}
)
# Arguments that index arithmetic never multiplies into a pointer, or of a load that stays narrow.
PLAIN = [
    "heads", "group", "offset", "left", "right", "ranges_b", "blocks_b", "blocks_h", "blocks_t",
    "blocks_s", "block_size", "samples",
]  # fmt: skip


def entry(
    fn: Any, label: str, dtype: str, width: int, tile: Tile, mode: int, drop: bool = False,
    plain: list[str] = PLAIN, packed: bool = False, **special: Any,
) -> Entry:  # fmt: skip
    """One launch of `fn` with heads of this width; `plain`: its do_not_specialize."""
    known: dict[str, Any] = dict(
        FACTOR=0.0, CAP=0.0, THRESHOLD=threshold(0.1) if drop else 0,
        KEEP_SCALE=1.0 / 0.9 if drop else 1.0, MODE=mode, ACC=tl.float32, D=width, DV=width,
        BLOCK_D=padded(width), BLOCK_DV=padded(width), WIDE=False, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, mask_s=1, bias_s=1, **special,
    )  # fmt: skip
    if not packed:
        known |= dict(cu_q_ptr=None, cu_k_ptr=None)
    constexprs = {name: known[name] for name in fn.arg_names if name in known}
    signature = {}
    for name in fn.arg_names:
        if name in constexprs:
            continue
        if name in ("factor", "cap", "scale"):
            signature[name] = "fp32"
        elif name.endswith("_ptr"):
            signature[name] = _OWN_TYPE.get(name, f"*{dtype}")
        else:
            signature[name] = "i32"
    divisible = tuple(n for n in signature if n not in plain and signature[n] != "fp32")
    name = f"{fn.__name__.removesuffix('_kernel')} {dtype} {width} {label}"
    return Entry(
        name, fn, signature, constexprs, divisible, tile.num_warps, tile.num_stages, TARGETS
    )  # fmt: skip
