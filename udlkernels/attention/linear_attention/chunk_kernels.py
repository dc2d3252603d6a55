"""What linear attention's kernels share: blocks, feature maps, products, states, launch tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry
from udlkernels.attention.attention.launch_tables import TARGETS, WIDE_STRIDE
from udlkernels.attention.attention.tile_kernels import padded, strides

__all__ = ["strides"]

IDENTITY = tl.constexpr(0)
ELU_PLUS_ONE = tl.constexpr(1)
RELU = tl.constexpr(2)
# Arguments that index arithmetic never multiplies into a row of a tile.
PLAIN = ["heads", "group", "tokens", "chunks", "kv_step", "z_step"]
SCAN_BLOCK = 256


@dataclass(frozen=True)
class Launch:
    """CHUNK tokens by blocks of the widths, how a program runs, and how it multiplies."""

    chunk: int
    block: int
    num_warps: int
    num_stages: int
    precision: str


# Sizes follow from compiled code: a chunk's scores and one block of results lie in registers, and
# nothing spills. Blocks of 64 spill 8 bytes in dv on sm_80, and those of 32 where rows are weighed.
HALF = Launch(64, 32, 8, 2, "tf32")
HALF_ROWS = Launch(64, 64, 8, 2, "tf32")
# Three products for one, of numbers split in two, whose parts lie in the registers too.
HALF_EXACT = Launch(64, 16, 8, 1, "tf32x3")
HALF_EXACT_SUMS = Launch(64, 32, 8, 1, "tf32x3")
# float32 has no tensor cores in full precision: products are multiply-adds from shared memory.
SINGLE = Launch(32, 16, 4, 1, "ieee")
DOUBLE = Launch(16, 16, 4, 1, "ieee")
# Tokens that one program sums where nothing asks what stands before each chunk.
STATE_TOKENS = 512


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_block(
    base, stride, first, rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] of a matrix from (first, column) on; zeros beside it."""
    row, col = tl.arange(0, ROWS), column + tl.arange(0, COLS)
    within = row.to(tl.int64) if WIDE else row
    at = base + first.to(tl.int64) * stride + (within[:, None] * stride + col[None, :])
    inside = (first + row < rows)[:, None] & (col < WIDTH)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_block(
    block, base, stride, first, rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    row, col = tl.arange(0, ROWS), column + tl.arange(0, COLS)
    at = base + first.to(tl.int64) * stride + (row[:, None] * stride + col[None, :])
    inside = (first + row < rows)[:, None] & (col < WIDTH)[None, :]
    tl.store(at, block.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_mapped(
    base, stride, first, rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, FEATURE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`load_block` through the feature map; zeros beside the matrix still."""
    x = load_block(base, stride, first, rows, column, WIDTH, ROWS, COLS, WIDE).to(ACC)
    if FEATURE == ELU_PLUS_ONE:
        row, col = first + tl.arange(0, ROWS), column + tl.arange(0, COLS)
        inside = (row < rows)[:, None] & (col < WIDTH)[None, :]
        x = tl.where(inside, tl.where(x > 0.0, x + 1.0, tl.exp(x)), 0.0)
    if FEATURE == RELU:
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def mapped_gradient(g, x, FEATURE: tl.constexpr):
    """The gradient of x, given that of phi(x)."""
    if FEATURE == ELU_PLUS_ONE:
        return g * tl.where(x > 0.0, 1.0, tl.exp(x))
    elif FEATURE == RELU:
        return tl.where(x <= 0.0, 0.0, g)
    else:
        return g


@triton.jit
def lower(CHUNK: tl.constexpr):
    """Which keys (columns) of its chunk a query (row) sees."""
    return tl.arange(0, CHUNK)[:, None] >= tl.arange(0, CHUNK)[None, :]


@triton.jit
def state_of(kv_ptr, z_ptr, kv_step, z_step, index, chunk, chunks, CAUSAL: tl.constexpr):
    """The state that a chunk of a key head starts from, or the one of the head."""
    unit = index * chunks + chunk if CAUSAL else index
    return kv_ptr + unit * kv_step, z_ptr + unit * z_step


@triton.jit
def products(
    x_ptr, x_t, y_ptr, y_t, first, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """phi(x) phi(y)^T of a chunk's rows of each, [CHUNK, CHUNK]."""
    acc = tl.zeros([CHUNK, CHUNK], ACC)
    for d in range(0, WIDTH, BLOCK):
        x = load_mapped(x_ptr, x_t, first, tokens, d, WIDTH, CHUNK, BLOCK, FEATURE, ACC, WIDE)
        y = load_mapped(y_ptr, y_t, first, tokens, d, WIDTH, CHUNK, BLOCK, FEATURE, ACC, WIDE)
        acc = dot(x, tl.trans(y), acc, PRECISION)
    return acc


@triton.jit
def through(
    x_ptr, x_t, first, tokens, kv_ptr, column, SUM_STEP: tl.constexpr, OUT_STEP: tl.constexpr,
    WIDTH: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """phi(x) times COLS columns of a state (or of the turned state), [CHUNK, COLS]."""
    acc = tl.zeros([CHUNK, COLS], ACC)
    col = column + tl.arange(0, COLS)
    for d in range(0, WIDTH, BLOCK):
        x = load_mapped(x_ptr, x_t, first, tokens, d, WIDTH, CHUNK, BLOCK, FEATURE, ACC, WIDE)
        row = d + tl.arange(0, BLOCK)
        inside = (row < WIDTH)[:, None] & (col < OUT)[None, :]
        at = kv_ptr + row[:, None] * SUM_STEP + col[None, :] * OUT_STEP
        acc = dot(x, tl.load(at, mask=inside, other=0.0), acc, PRECISION)
    return acc


@triton.jit
def weighed(
    x_ptr, x_t, first, tokens, z_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, FEATURE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """phi(x) . z, [CHUNK]."""
    acc = tl.zeros([CHUNK], ACC)
    for d in range(0, WIDTH, BLOCK):
        x = load_mapped(x_ptr, x_t, first, tokens, d, WIDTH, CHUNK, BLOCK, FEATURE, ACC, WIDE)
        col = d + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + col, mask=col < WIDTH, other=0.0)
        acc += tl.sum(x * z[None, :], 1)
    return acc


@triton.jit(do_not_specialize=PLAIN)
def linear_attention_sums_kernel(
    x_ptr, y_ptr, inverse_ptr, delta_ptr, sums_ptr, x_b, x_h, x_t, y_b, y_h, y_t,
    heads, group, tokens, chunks,
    TILES: tl.constexpr, WEIGHTED: tl.constexpr, FEATURE: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of a chunk's sum of phi(x) y^T, and of phi(x), over `group` heads in order.

    WEIGHTED: of what queries give to keys, phi(q) / denominator, and dout, and minus dout . out.
    """
    chunk = tl.program_id(0) % chunks
    state = (tl.program_id(0) // chunks).to(tl.int64)
    b = state // heads
    row, column = tl.program_id(1) * BLOCK_D, tl.program_id(2) * BLOCK_DV
    acc = tl.zeros([BLOCK_D, BLOCK_DV], ACC)
    total = tl.zeros([BLOCK_D], ACC)
    for n in range(group * TILES):
        h = state % heads * group + n // TILES
        first = (chunk * TILES + n % TILES) * CHUNK
        x = load_mapped(
            x_ptr + b * x_b + h * x_h, x_t, first, tokens, row, D, CHUNK, BLOCK_D, FEATURE, ACC,
            WIDE,
        )  # fmt: skip
        y = load_block(
            y_ptr + b * y_b + h * y_h, y_t, first, tokens, column, DV, CHUNK, BLOCK_DV, WIDE
        ).to(ACC)
        if WEIGHTED:
            i = first + tl.arange(0, CHUNK)
            at = (b * heads * group + h) * tokens + i
            x *= tl.load(inverse_ptr + at, mask=i < tokens, other=0.0)[:, None]
            delta = tl.load(delta_ptr + at, mask=i < tokens, other=0.0)
            total -= tl.sum(x * delta[:, None], 0)
        else:
            total += tl.sum(x, 0)
        acc = dot(tl.trans(x), y, acc, PRECISION)
    base = sums_ptr + (state * chunks + chunk) * (D * DV + D)
    i, j = row + tl.arange(0, BLOCK_D), column + tl.arange(0, BLOCK_DV)
    inside = (i < D)[:, None] & (j < DV)[None, :]
    tl.store(base + i[:, None] * DV + j[None, :], acc, mask=inside)
    tl.store(base + D * DV + i, total, mask=(i < D) & (column == 0))


@triton.jit(do_not_specialize=["chunks"])
def linear_attention_scan_kernel(
    sums_ptr, kv_ptr, z_ptr, kv_out_ptr, z_out_ptr, size, chunks, width,
    GIVEN: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of a head's chunks in order. KEEP: in their place, what stands before each."""
    pieces = tl.cdiv(size, BLOCK)
    state = (tl.program_id(0) // pieces).to(tl.int64)
    i = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    products = size - width
    of_kv, of_z = i < products, (i >= products) & (i < size)
    kv_at, z_at = state * products + i, state * width + (i - products)
    carry = tl.zeros([BLOCK], sums_ptr.dtype.element_ty)
    if GIVEN:
        carry += tl.load(kv_ptr + kv_at, mask=of_kv, other=0.0)
        carry += tl.load(z_ptr + z_at, mask=of_z, other=0.0)
    for n in range(chunks):
        chunk = chunks - 1 - n if REVERSE else n
        at = sums_ptr + (state * chunks + chunk) * size + i
        found = tl.load(at, mask=i < size, other=0.0)
        if KEEP:
            tl.store(at, carry, mask=i < size)
        carry += found
    tl.store(kv_out_ptr + kv_at, carry, mask=of_kv)
    tl.store(z_out_ptr + z_at, carry, mask=of_z)


class Problem:
    """The arguments that forward and backward pass to their kernels alike."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: int, causal: bool
    ) -> None:
        self.batch, self.heads, _, self.width = q.shape
        self.kv_heads, self.value_width, self.causal = k.shape[1], v.shape[3], causal
        self.group, self.states = self.heads // self.kv_heads, self.batch * self.kv_heads
        self.feature_map, self.dtype = feature_map, q.dtype
        self.acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.chunk = pick(q.dtype, False).chunk
        self.wide = any(self.is_wide(t) for t in (q, k, v))
        self.state_tiles = 1 if causal else STATE_TOKENS // self.chunk

    @staticmethod
    def is_wide(x: torch.Tensor) -> bool:
        return x.stride(2) >= WIDE_STRIDE

    def counts(self, x: torch.Tensor) -> tuple[int, int, int, int]:
        """Heads, heads of a group, tokens and chunks of programs that own rows of x."""
        return x.shape[1], self.group, x.shape[2], triton.cdiv(x.shape[2], self.chunk)

    def programs(self, x: torch.Tensor) -> int:
        return x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], self.chunk)

    def starts(
        self, sums: torch.Tensor | None, kv: torch.Tensor | None, z: torch.Tensor | None
    ) -> tuple[tuple[Any, Any], tuple[int, int]]:
        """kv and z that the rows of a chunk start from, and how far apart these stand."""
        size = self.width * self.value_width
        if self.causal and sums is not None:
            return (sums, sums[0, 0, size:]), (size + self.width, size + self.width)
        return (kv, z), (size, self.width)

    def at(self, exact: bool, part: str = "") -> dict[str, Any]:
        """Keyword arguments of a launch; `exact` where it computes float32 results."""
        return self._at(pick(self.dtype, exact, part)) | dict(CAUSAL=self.causal)

    def at_sums(self, exact: bool) -> dict[str, Any]:
        return self._at(pick(self.dtype, exact, "sums"))

    def _at(self, launch: Launch) -> dict[str, Any]:
        found = constants(launch, self.acc, self.feature_map, self.width, self.value_width)
        return dict(found, WIDE=self.wide, num_warps=launch.num_warps, num_stages=launch.num_stages)


def blocks(given: dict[str, Any]) -> tuple[int, int]:
    """Into how many blocks a launch cuts the width and the values' width."""
    return (
        triton.cdiv(given["D"], given["BLOCK_D"]),
        triton.cdiv(given["DV"], given["BLOCK_DV"]),
    )


def pick(dtype: torch.dtype, exact: bool, part: str = "") -> Launch:
    """`part`: "sums" and "rows" for the kernels named so."""
    if dtype.itemsize != 2:
        return SINGLE if dtype.itemsize == 4 else DOUBLE
    if exact:
        return HALF_EXACT_SUMS if part == "sums" else HALF_EXACT
    return HALF_ROWS if part == "rows" else HALF


def constants(
    launch: Launch, acc: torch.dtype, feature: int, width: int, v_width: int
) -> dict[str, Any]:
    return dict(
        FEATURE=feature, PRECISION=launch.precision,
        ACC=tl.float64 if acc == torch.float64 else tl.float32, D=width, DV=v_width,
        CHUNK=launch.chunk, BLOCK_D=min(launch.block, padded(width)),
        BLOCK_DV=min(launch.block, padded(v_width)),
    )  # fmt: skip


_IN_FLOAT32 = ("kv_ptr", "z_ptr", "inverse_ptr", "delta_ptr", "sums_ptr")


def entries(fn: Any, exact: bool = False, **special: Any) -> Iterator[Entry]:
    """Launches of `fn`, with a causal mask and without."""
    part = fn.__name__.split("_")[2]
    sums = part == "sums"
    for dtype in ("bf16",) if exact else ("bf16", "fp32"):
        launch = pick(torch.bfloat16 if dtype == "bf16" else torch.float32, exact, part)
        for width in (64, 128):
            for causal in (True,) if sums else (True, False):
                known = constants(launch, torch.float32, ELU_PLUS_ONE.value, width, width)
                known |= dict(WIDE=False, CAUSAL=causal, **special)
                constexprs = {n: known[n] for n in fn.arg_names if n in known}
                signature = {
                    name: ("*fp32" if name in _IN_FLOAT32 else f"*{dtype}")
                    if name.endswith("_ptr")
                    else "i32"
                    for name in fn.arg_names
                    if name not in constexprs
                }
                words = [fn.__name__.removesuffix("_kernel"), dtype, str(width)]
                words += ["causal"] * (causal and not sums) + ["exact"] * exact
                words += ["of queries"] * special.get("WEIGHTED", False)
                yield Entry(
                    " ".join(words), fn, signature, constexprs,
                    tuple(name for name in signature if name not in PLAIN), launch.num_warps,
                    launch.num_stages, TARGETS,
                )  # fmt: skip
