"""The Triton kernels of merge_lse, and their launches.

Traffic per element: forward reads both parts and writes the result; backward reads dout and both
parts and writes two gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry
from udlkernels.attention.attention.sdpa import result
from udlkernels.attention.attention.tile_kernels import strides

_ELEMENTS = 2048  # of a tile: 16 a thread, and two such tiles at a time
_WIDEST = 512  # wider rows are walked in pieces


@triton.jit
def _shares(lse_a, lse_b):
    """Which part has keys, the shares of both, and the logarithm of all."""
    has_a, has_b = lse_a != float("-inf"), lse_b != float("-inf")
    both = has_a & has_b
    d = tl.where(both, lse_a, 0.0) - tl.where(both, lse_b, 0.0)
    e = tl.exp(-tl.abs(d))
    whole = 1.0 + e
    large, small = 1.0 / whole, e / whole
    share_a = tl.where(both, tl.where(d > 0, large, small), has_a.to(d.dtype))
    share_b = tl.where(both, tl.where(d > 0, small, large), has_b.to(d.dtype))
    # log(1 + e), also where 1 + e rounds what is left of e.
    more = tl.where(whole == 1.0, e, tl.log(whole) * (e / tl.where(whole == 1.0, 1.0, whole - 1.0)))
    top = tl.where(has_a & ((d > 0) | (has_b == 0)), lse_a, lse_b)
    top = tl.where(both & (d != d), d, top)
    return has_a, has_b, share_a, share_b, tl.where(both, top + more, top)


@triton.jit
def _place(n, heads, rows, HEADS_LAST: tl.constexpr):
    """Sample, head and position of the rows n, which are counted in memory's order."""
    if HEADS_LAST:
        return n // heads // rows, n % heads, n // heads % rows
    else:
        return n // rows // heads, n // rows % heads, n % rows


@triton.jit
def _merge_lse_kernel(
    a_ptr, b_ptr, lse_a_ptr, lse_b_ptr, out_ptr, lse_ptr,
    a_b, a_h, a_t, b_b, b_h, b_t, lse_a_b, lse_a_h, lse_a_t, lse_b_b, lse_b_h, lse_b_t,
    out_b, out_h, out_t, heads, rows, total, width,
    HEADS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b, h, t = _place(n, heads, rows, HEADS_LAST)
    inside = n < total
    lse_a = tl.load(lse_a_ptr + b * lse_a_b + h * lse_a_h + t * lse_a_t, mask=inside, other=0.0)
    lse_b = tl.load(lse_b_ptr + b * lse_b_b + h * lse_b_h + t * lse_b_t, mask=inside, other=0.0)
    has_a, has_b, share_a, share_b, lse = _shares(lse_a, lse_b)
    tl.store(lse_ptr + (b * heads + h) * rows + t, lse, mask=inside)
    a_at = (a_ptr + b * a_b + h * a_h + t * a_t)[:, None]
    b_at = (b_ptr + b * b_b + h * b_h + t * b_t)[:, None]
    out_at = (out_ptr + b * out_b + h * out_h + t * out_t)[:, None]
    for start in range(0, width if LOOP else 1, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)[None, :]
        seen = inside[:, None] & (at < width)
        # What a part without keys holds is not read, and so is never multiplied.
        x = tl.load(a_at + at, mask=seen & has_a[:, None], other=0.0).to(lse.dtype)
        y = tl.load(b_at + at, mask=seen & has_b[:, None], other=0.0).to(lse.dtype)
        out = x * share_a[:, None] + y * share_b[:, None]
        tl.store(out_at + at, out.to(out_ptr.dtype.element_ty), mask=seen)


@triton.jit
def _merge_lse_bwd_kernel(
    a_ptr, b_ptr, lse_a_ptr, lse_b_ptr, dout_ptr, dlse_ptr, da_ptr, db_ptr, dlse_a_ptr, dlse_b_ptr,
    a_b, a_h, a_t, b_b, b_h, b_t, lse_a_b, lse_a_h, lse_a_t, lse_b_b, lse_b_h, lse_b_t,
    dout_b, dout_h, dout_t, dlse_b, dlse_h, dlse_t, da_b, da_h, da_t, heads, rows, total, width,
    HEADS_LAST: tl.constexpr, DLSE: tl.constexpr, NEED_OUT: tl.constexpr, NEED_LSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """The gradients to both outputs share their strides, and those to the logarithms too."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b, h, t = _place(n, heads, rows, HEADS_LAST)
    inside = n < total
    lse_a = tl.load(lse_a_ptr + b * lse_a_b + h * lse_a_h + t * lse_a_t, mask=inside, other=0.0)
    lse_b = tl.load(lse_b_ptr + b * lse_b_b + h * lse_b_h + t * lse_b_t, mask=inside, other=0.0)
    has_a, has_b, share_a, share_b, _lse = _shares(lse_a, lse_b)
    both = has_a & has_b
    a_at = (a_ptr + b * a_b + h * a_h + t * a_t)[:, None]
    b_at = (b_ptr + b * b_b + h * b_h + t * b_t)[:, None]
    dout_at = (dout_ptr + b * dout_b + h * dout_h + t * dout_t)[:, None]
    to = (b * da_b + h * da_h + t * da_t)[:, None]
    turn = tl.zeros([BLOCK_ROWS], lse_a.dtype)
    for start in range(0, width if LOOP else 1, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)[None, :]
        seen = inside[:, None] & (at < width)
        g = tl.load(dout_at + at, mask=seen, other=0.0).to(lse_a.dtype)
        if NEED_OUT:
            da = tl.where(has_a[:, None], g * share_a[:, None], 0.0)
            db = tl.where(has_b[:, None], g * share_b[:, None], 0.0)
            tl.store(da_ptr + to + at, da.to(da_ptr.dtype.element_ty), mask=seen)
            tl.store(db_ptr + to + at, db.to(db_ptr.dtype.element_ty), mask=seen)
        if NEED_LSE:
            x = tl.load(a_at + at, mask=seen & both[:, None], other=0.0).to(lse_a.dtype)
            y = tl.load(b_at + at, mask=seen & both[:, None], other=0.0).to(lse_a.dtype)
            turn += tl.sum(g * (x - y), 1)
    if NEED_LSE:
        turn = tl.where(both, turn * share_a * share_b, 0.0)
        dlse = tl.zeros([BLOCK_ROWS], lse_a.dtype)
        if DLSE:
            at = dlse_ptr + b * dlse_b + h * dlse_h + t * dlse_t
            dlse = tl.load(at, mask=inside, other=0.0)
        line = (b * heads + h) * rows + t
        tl.store(dlse_a_ptr + line, tl.where(has_a, share_a * dlse + turn, 0.0), mask=inside)
        tl.store(dlse_b_ptr + line, tl.where(has_b, share_b * dlse - turn, 0.0), mask=inside)


def _blocks(width: int) -> dict[str, Any]:
    block = min(triton.next_power_of_2(width), _WIDEST)
    return {"BLOCK_ROWS": _ELEMENTS // max(block, 16), "BLOCK_D": block, "LOOP": width > block}


def merge_lse_fwd(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor,
    heads_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, heads, rows, width = out_a.shape
    out, lse = result(out_a, width, heads_last), lse_a.new_empty(lse_a.shape)
    blocks, total = _blocks(width), batch * heads * rows
    _merge_lse_kernel[(triton.cdiv(total, blocks["BLOCK_ROWS"]),)](
        out_a, out_b, lse_a, lse_b, out, lse, *strides(out_a, out_b, lse_a, lse_b, out),
        heads, rows, total, width, HEADS_LAST=heads_last, **blocks, num_warps=4,
    )  # fmt: skip
    return out, lse


def merge_lse_bwd(
    dout: torch.Tensor, dlse: torch.Tensor | None, out_a: torch.Tensor, lse_a: torch.Tensor,
    out_b: torch.Tensor, lse_b: torch.Tensor, heads_last: bool, need_out: bool, need_lse: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients to out_a, lse_a, out_b, lse_b; what is not wanted comes back without elements."""
    batch, heads, rows, width = out_a.shape
    da, dlse_a, db, dlse_b = (out_a.new_empty((0,), dtype=torch.float32) for _ in range(4))
    if need_out:
        da, db = result(out_a, width, heads_last), result(out_a, width, heads_last)
    if need_lse:
        dlse_a, dlse_b = lse_a.new_empty(lse_a.shape), lse_a.new_empty(lse_a.shape)
    blocks, total = _blocks(width), batch * heads * rows
    given = lse_a if dlse is None else dlse
    like = da if need_out else dout
    _merge_lse_bwd_kernel[(triton.cdiv(total, blocks["BLOCK_ROWS"]),)](
        out_a, out_b, lse_a, lse_b, dout, given, da, db, dlse_a, dlse_b,
        *strides(out_a, out_b, lse_a, lse_b, dout, given, like), heads, rows, total, width,
        HEADS_LAST=heads_last, DLSE=dlse is not None, NEED_OUT=need_out, NEED_LSE=need_lse,
        **blocks, num_warps=4,
    )  # fmt: skip
    return da, dlse_a, db, dlse_b


def _entry(fn: Any, name: str, dtype: str, width: int, **special: Any) -> Entry:
    constexprs = dict(HEADS_LAST=False, **_blocks(width), **special)
    signature = {}
    for argument in fn.arg_names:
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if "lse" in argument else f"*{dtype}"
        elif argument not in constexprs:
            signature[argument] = "i32"
    divisible = tuple(n for n in signature if n not in ("heads", "rows", "total"))
    return Entry(f"{name} {dtype} {width}", fn, signature, constexprs, divisible, 4)


AOT = tuple(
    entry
    for width in (64, 128, 512, 1024)
    for dtype in ("bf16", "fp32")
    for entry in (
        _entry(_merge_lse_kernel, "merge_lse_fwd", dtype, width),
        _entry(
            _merge_lse_bwd_kernel, "merge_lse_bwd", dtype, width, DLSE=True, NEED_OUT=True,
            NEED_LSE=True,
        ),
    )
)  # fmt: skip
