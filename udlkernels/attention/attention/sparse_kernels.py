"""Which keys the range of a query, and a mask of blocks, leave of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

# Bits of MODE.
RANGES = tl.constexpr(256)
# Blocks that cut tiles, and blocks made of whole tiles: one number says all of a tile then.
BLOCKS = tl.constexpr(512)
TILES = tl.constexpr(1024)


@triton.jit
def row_ranges(ranges_ptr, i, queries, keys):
    """[low, high) of the keys that queries i see; one beyond the last has the last one's."""
    at = ranges_ptr + tl.minimum(i, queries - 1).to(tl.int64) * 2
    low = tl.maximum(tl.minimum(tl.load(at), keys), 0).to(tl.int32)
    return low, tl.maximum(tl.minimum(tl.load(at + 1), keys), 0).to(tl.int32)


@triton.jit
def narrowed(low, high, full_low, full_high, lows, highs, keys):
    """The keys that any of the queries sees, and those that all of them see."""
    some = highs > lows
    low = tl.maximum(low, tl.min(tl.where(some, lows, keys), 0))
    high = tl.minimum(high, tl.max(tl.where(some, highs, 0), 0))
    full_low = tl.maximum(tl.maximum(full_low, tl.max(lows, 0)), low)
    return low, high, full_low, tl.minimum(full_high, tl.min(highs, 0))


@triton.jit
def in_range(i, j, lows, highs):
    """Which keys j of a tile lie in the ranges of its queries i, along either axis."""
    if i.shape[0] == 1:
        return (j >= lows[None, :]) & (j < highs[None, :])
    else:
        return (j >= lows[:, None]) & (j < highs[:, None])


@triton.jit
def blocks_seen(first, start, i, j, window, extras, MODE: tl.constexpr):
    """Whether the block mask leaves anything of a tile, and with BLOCKS which scores.

    The tile starts at query `first` and key `start`; i, j are its queries and keys, on two axes.
    """
    if (TILES | BLOCKS) & MODE:
        blocks_ptr, blocks_t, blocks_s, size = extras[6], extras[7], extras[8], extras[9]
        row, col = first // size, start // size
        blocks_ptr += row.to(tl.int64) * blocks_t + col.to(tl.int64) * blocks_s
        if TILES & MODE:
            return tl.load(blocks_ptr) != 0, 0
        else:
            at = blocks_ptr + ((i // size - row) * blocks_t + (j // size - col) * blocks_s)
            seen = tl.load(at, mask=(i < window[0]) & (j < window[1]), other=0)
            return tl.max(tl.max(seen.to(tl.int32), 1), 0) != 0, seen
    else:
        return True, 0
