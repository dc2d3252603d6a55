"""What an attention kernel is asked for, as bits, and the tiles that it then runs with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton.language as tl

from udlkernels.attention.attention.sparse_kernels import BLOCKS, RANGES, TILES

# Bits of MODE, one for each thing that a kernel has to do beyond softmax(q k) v.
MASK = tl.constexpr(1)
BIAS = tl.constexpr(2)
ALIBI = tl.constexpr(4)
SOFTCAP = tl.constexpr(8)
LEFT = tl.constexpr(16)
RIGHT = tl.constexpr(32)
LENGTHS = tl.constexpr(64)
SINKS = tl.constexpr(128)
# Any of them can mask any single key, so a row of a loaded tile may be one that nobody sees.
SELECTS = tl.constexpr(MASK.value | BIAS.value | BLOCKS.value)
# Bits that want registers: the launch takes smaller tiles.
HEAVY = SELECTS.value | SOFTCAP.value | RANGES.value
# Rows this far apart need 64-bit offsets inside a tile of 128 rows too.
WIDE_STRIDE = 2**23


@dataclass(frozen=True)
class Tile:
    """BLOCK_M queries by BLOCK_N keys, and how a program runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """Tiles for heads up to `limit` wide."""

    limit: int
    forward: Tile
    dkdv: Tile
    dq: Tile


# Where the tables hold: none of their entries spills there. On sm_100 two of 51 spill 8 bytes; on
# gfx942 half of them spill, so op.py does not take AMD GPUs.
TARGETS = ("sm_80", "sm_90")

# One set of tables for all GPUs: tiles, and with them the orders of all sums, depend on type, width
# and MODE alone. Sizes follow from compiled code, not from timings.
# 128 x 64 at 8 warps take 110 to 240 registers in the forward; dk and dv are two accumulators that
# fill the registers already at 64 x 64.
HALF = (
    Launch(64, Tile(128, 64, 8, 2), Tile(32, 64, 4, 2), Tile(128, 64, 8, 2)),
    Launch(128, Tile(128, 64, 8, 2), Tile(32, 64, 4, 1), Tile(128, 32, 8, 2)),
    Launch(256, Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    Launch(512, Tile(32, 16, 8, 1), Tile(16, 16, 8, 2), Tile(16, 16, 8, 1)),
)
# What HEAVY modes and dropout compute beside the products lies in the registers too: a quarter of
# the tile.
HALF_HEAVY = (
    Launch(64, Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 4, 2)),
    Launch(128, Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 1)),
    Launch(256, Tile(32, 32, 8, 1), Tile(16, 32, 8, 2), Tile(32, 32, 8, 1)),
    Launch(512, Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)
# float32 in full precision has no tensor cores: a product is fused multiply-adds on operands from
# shared memory, and small tiles keep them in registers; beyond 128 wide the backward spills.
SINGLE = (
    Launch(64, Tile(32, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1)),
    Launch(128, Tile(32, 32, 16, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    Launch(256, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    Launch(512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)
# With ranges, or blocks that cut tiles.
SINGLE_SPARSE = (
    Launch(64, Tile(32, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    Launch(512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)
# Blocks of a block mask whose size is a multiple of 64 are made of these tiles, and a tile that is
# not seen costs a branch. Beyond 256 that branch is what makes the backward spill.
HALF_TILES = (
    Launch(64, Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2)),
    Launch(128, Tile(64, 64, 4, 2), Tile(32, 64, 4, 1), Tile(64, 64, 8, 2)),
    HALF[2],
)
DOUBLE = (Launch(512, Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),)
# Where a packed sequence lies is read from memory, and such numbers take a register in each thread:
# pipelines of another depth keep them from spilling. The depth changes no bit, nor do the warps of
# the dq pass, in which no sum crosses them.
PACKED_HALF = (
    *HALF[:2],
    replace(HALF[2], dkdv=Tile(32, 32, 8, 2), dq=Tile(32, 32, 4, 2)),
    replace(HALF[3], dkdv=Tile(16, 16, 8, 3), dq=Tile(16, 16, 8, 2)),
)
PACKED_HEAVY = (
    *HALF_HEAVY[:2],
    replace(HALF_HEAVY[2], forward=Tile(32, 32, 8, 3), dq=Tile(32, 32, 8, 2)),
    replace(HALF_HEAVY[3], dq=Tile(16, 16, 8, 2)),
)
PACKED_SINGLE = (
    replace(SINGLE[0], forward=Tile(32, 16, 4, 2), dq=Tile(16, 32, 8, 2)),
    *SINGLE[1:],
)


def pick(dtype: torch.dtype, width: int, mode: int, drops: bool, packed: bool) -> Launch:
    heavy, sparse = drops or (mode & HEAVY) != 0, mode & (RANGES.value | BLOCKS.value)
    half = HALF_TILES if mode & TILES.value else HALF_HEAVY if heavy else HALF
    single = SINGLE_SPARSE if sparse else SINGLE
    if packed:
        half, single = PACKED_HEAVY if heavy else PACKED_HALF, PACKED_SINGLE
    table = {8: DOUBLE, 4: single}.get(dtype.itemsize, half)
    return next(launch for launch in table if width <= launch.limit)


def tiles_fit(dtype: torch.dtype, width: int, block_size: int) -> bool:
    """Whether blocks of this size are made of the tiles of `HALF_TILES`."""
    return dtype.itemsize == 2 and width <= HALF_TILES[-1].limit and block_size % 64 == 0
