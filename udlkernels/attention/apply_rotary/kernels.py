"""The Triton kernel of apply_rotary, and its launches.

One program turns BLOCK_T positions of HEADS heads by the same tables. Traffic: x once in, once out,
and the tables once for every HEADS heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry

# Pairs of a tile: 16 a thread, whose numbers and tables take about 64 registers.
_PAIRS = 2048
_HEADS = 4


@triton.jit
def _apply_rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_batch, x_head, x_row, out_batch, out_head, out_row,
    cos_batch, cos_row, sin_batch, sin_row, heads, positions,
    HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    ACC: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The first 2 * HALF numbers of each head turn; REST more are copied (none in place)."""
    tiles, groups = tl.cdiv(positions, BLOCK_T), tl.cdiv(heads, HEADS)
    batch = (tl.program_id(0) // tiles // groups).to(tl.int64)
    first_head = tl.program_id(0) // tiles % groups * HEADS
    t = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK_R)[None, :]
    mask = (t < positions) & (i < HALF)  # [BLOCK_T, BLOCK_R]
    cos = tl.load(cos_ptr + batch * cos_batch + t * cos_row + i, mask=mask, other=0.0).to(ACC)
    sin = tl.load(sin_ptr + batch * sin_batch + t * sin_row + i, mask=mask, other=0.0).to(ACC)
    if INVERSE:
        sin = -sin
    kind = out_ptr.dtype.element_ty
    for n in range(tl.minimum(HEADS, heads - first_head)):
        h = (first_head + n).to(tl.int64)
        x_at = x_ptr + batch * x_batch + h * x_head + t * x_row
        out_at = out_ptr + batch * out_batch + h * out_head + t * out_row
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK_R)[None, :]
            inside = (t < positions) & (both < 2 * HALF)
            x = tl.load(x_at + both, mask=inside, other=0.0).to(ACC)
            a, b = tl.split(tl.reshape(x, [BLOCK_T, BLOCK_R, 2]))
            y = tl.join(a * cos - b * sin, b * cos + a * sin)
            tl.store(out_at + both, tl.reshape(y, [BLOCK_T, 2 * BLOCK_R]).to(kind), mask=inside)
        else:
            a = tl.load(x_at + i, mask=mask, other=0.0).to(ACC)
            b = tl.load(x_at + HALF + i, mask=mask, other=0.0).to(ACC)
            tl.store(out_at + i, (a * cos - b * sin).to(kind), mask=mask)
            tl.store(out_at + HALF + i, (b * cos + a * sin).to(kind), mask=mask)
        if REST > 0:
            for start in range(0, REST, BLOCK_REST):
                at = start + tl.arange(0, BLOCK_REST)[None, :]
                copied = (t < positions) & (at < REST)
                rest = tl.load(x_at + 2 * HALF + at, mask=copied, other=0.0)
                tl.store(out_at + 2 * HALF + at, rest, mask=copied)


def _blocks(half: int, rest: int, positions: int) -> dict[str, int]:
    pairs = triton.next_power_of_2(half)
    piece = min(triton.next_power_of_2(max(rest, 1)), 128)
    return {
        "HEADS": _HEADS,
        "BLOCK_T": min(max(_PAIRS // max(pairs, piece), 1), triton.next_power_of_2(positions)),
        "BLOCK_R": pairs,
        "BLOCK_REST": piece,
    }


def _launch(
    out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool,
    inverse: bool, heads_last: bool,
) -> None:  # fmt: skip
    batch, heads, positions, width = x.shape
    if heads_last:
        heads, positions = positions, heads
    half = cos.shape[-1]
    rest = 0 if out is x else width - 2 * half
    blocks = _blocks(half, rest, positions)
    programs = batch * triton.cdiv(heads, _HEADS) * triton.cdiv(positions, blocks["BLOCK_T"])
    _apply_rotary_kernel[(programs,)](
        x, cos, sin, out, *_strides(x, heads_last), *_strides(out, heads_last),
        *_table_strides(cos), *_table_strides(sin), heads, positions,
        HALF=half, REST=rest, INTERLEAVED=interleaved, INVERSE=inverse,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, **blocks, num_warps=4,
    )  # fmt: skip


def _strides(x: torch.Tensor, heads_last: bool) -> tuple[int, int, int]:
    batch, head, row, _ = x.stride()
    return (batch, row, head) if heads_last else (batch, head, row)


def _table_strides(table: torch.Tensor) -> tuple[int, int]:
    return (table.stride(0) if table.dim() == 3 else 0, table.stride(-2))


def apply_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool,
    heads_last: bool,
) -> torch.Tensor:  # fmt: skip
    out = x.new_empty(x.shape)
    _launch(out, x, cos, sin, interleaved, inverse, heads_last)
    return out


def apply_rotary_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool,
    heads_last: bool,
) -> None:  # fmt: skip
    _launch(x, x, cos, sin, interleaved, inverse, heads_last)


def _entry(
    name: str, dtype: str, half: int, rest: int, interleaved: bool, positions: int = 4096
) -> Entry:
    signature = {}
    constexprs = dict(
        HALF=half, REST=rest, INTERLEAVED=interleaved, INVERSE=False, ACC=tl.float32,
        **_blocks(half, rest, positions),
    )  # fmt: skip
    for argument in _apply_rotary_kernel.arg_names:
        if argument in constexprs:
            continue
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in ("cos_ptr", "sin_ptr") else f"*{dtype}"
        else:
            signature[argument] = "i32"
    divisible = tuple(n for n in signature if n not in ("heads", "positions"))
    return Entry(f"{name} {dtype}", _apply_rotary_kernel, signature, constexprs, divisible, 4)


AOT = tuple(
    _entry(f"apply_rotary {name}", dtype, half, rest, interleaved, positions)
    for name, half, rest, interleaved, positions in (
        ("128", 64, 0, False, 4096),
        ("128 of a token", 64, 0, False, 1),
        ("64", 32, 0, False, 4096),
        ("32 of 80", 16, 48, False, 4096),
        ("256", 128, 0, False, 4096),
        ("64 of 256 neighbours", 32, 192, True, 4096),
        ("128 neighbours", 64, 0, True, 4096),
    )
    for dtype in ("bf16", "fp32")
)
