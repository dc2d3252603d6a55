"""The Triton kernels of relative_position_bias, and their launches.

Forward, a program gathers a tile of positions and heads from the table, which stays in the caches.
Backward, a program owns a block of the table's rows for one head and a chunk of positions: it adds
each position to the lane of its row that the position falls on, and the chunks are summed in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry
from udlkernels.normalization._row_kernels import sum_partials

_BLOCK_H, _BLOCK_P = 8, 256  # of the forward: 16 numbers a thread
_ROWS, _LANES = 32, 64  # of the backward: sums of 2048 numbers, 16 a thread
# With more rows than this most programs find none of theirs at most positions, and look first.
_FEW = 4 * _ROWS


@triton.jit
def _gather_kernel(
    table_ptr, index_ptr, out_ptr, n, heads, positions,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    row = tl.load(index_ptr + p, mask=p < positions, other=0).to(tl.int64)
    known = ((row >= 0) & (row < n))[None, :]
    inside = (h < heads) & (p < positions)[None, :]
    at = table_ptr + row[None, :] * heads + h
    bias = tl.load(at, mask=inside & known, other=float("nan"))
    tl.store(out_ptr + h * positions + p[None, :], bias, mask=inside)


@triton.jit
def _sum_kernel(
    dout_ptr, index_ptr, partials_ptr, n, heads, positions, chunk,
    LOOK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """partials[chunk, row, head] = the sum of dout[head, p] over p with index[p] = row."""
    first = tl.program_id(0).to(tl.int64) * chunk
    first_row = tl.program_id(1) * ROWS
    head = tl.program_id(2).to(tl.int64)
    row = first_row + tl.arange(0, ROWS)
    end = tl.minimum(first + chunk, positions)
    dout_at = dout_ptr + head * positions
    sums = tl.zeros([ROWS, LANES], partials_ptr.dtype.element_ty)
    for start in range(0, (end - first).to(tl.int32), LANES):
        p = first + start + tl.arange(0, LANES)
        found = tl.load(index_ptr + p, mask=p < end, other=-1)
        wanted = 1
        if LOOK:
            own = (found >= first_row) & (found < first_row + ROWS)
            wanted = tl.sum(own.to(tl.int32), 0)
        if wanted > 0:
            g = tl.load(dout_at + p, mask=p < end, other=0.0).to(sums.dtype)
            sums += tl.where(found[None, :] == row[:, None], g[None, :], 0.0)
    at = partials_ptr + (tl.program_id(0).to(tl.int64) * n + row) * heads + head
    tl.store(at, tl.sum(sums, 1), mask=row < n)


def relative_position_bias_fwd(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    n, heads = table.shape
    out = table.new_empty((heads, *index.shape))
    positions = index.numel()
    _gather_kernel[(triton.cdiv(positions, _BLOCK_P), triton.cdiv(heads, _BLOCK_H))](
        table, index, out, n, heads, positions, BLOCK_H=_BLOCK_H, BLOCK_P=_BLOCK_P, num_warps=4
    )
    return out


def relative_position_bias_bwd(dout: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    heads, positions = dout.shape[0], index.numel()
    # A function of extents alone; the partial sums take at most an eighth of dout's elements.
    chunk = max(2048, triton.cdiv(8 * n, _LANES) * _LANES)
    chunks = triton.cdiv(positions, chunk)
    acc = torch.float64 if dout.dtype == torch.float64 else torch.float32
    partials = dout.new_empty((chunks, n * heads), dtype=acc)
    _sum_kernel[(chunks, triton.cdiv(n, _ROWS), heads)](
        dout, index, partials, n, heads, positions, chunk,
        LOOK=n > _FEW, ROWS=_ROWS, LANES=_LANES, num_warps=4,
    )  # fmt: skip
    return sum_partials(partials, dout.new_empty((n, heads)))


def _entries(dtype: str, index: str) -> tuple[Entry, ...]:
    numbers = dict.fromkeys(("n", "heads", "positions"), "i32")
    gather = Entry(
        f"relative_position_bias_fwd {dtype} {index}", _gather_kernel,
        {"table_ptr": f"*{dtype}", "index_ptr": f"*{index}", "out_ptr": f"*{dtype}", **numbers},
        {"BLOCK_H": _BLOCK_H, "BLOCK_P": _BLOCK_P},
        ("table_ptr", "index_ptr", "out_ptr", "positions"),
    )  # fmt: skip
    types: dict[str, Any] = {
        "dout_ptr": f"*{dtype}", "index_ptr": f"*{index}", "partials_ptr": "*fp32", **numbers,
        "chunk": "i32",
    }  # fmt: skip
    sums = tuple(
        Entry(
            f"relative_position_bias_bwd {dtype} {index} {'many' if look else 'few'} rows",
            _sum_kernel, types, {"LOOK": look, "ROWS": _ROWS, "LANES": _LANES},
            ("dout_ptr", "index_ptr", "partials_ptr", "positions", "chunk"),
        )
        for look in (False, True)
    )  # fmt: skip
    return gather, *sums


AOT = tuple(
    entry
    for dtype in ("bf16", "fp32")
    for index in ("i64", "i32")
    for entry in _entries(dtype, index)
)
