"""center_rows on a GPU: one program a row, in pieces of BLOCK columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry

# 8 elements a thread at 4 warps compile to 128-bit loads. From compiled code, not from timings.
BLOCK = 1024


@triton.jit
def _center_rows_kernel(x_ptr, y_ptr, n_cols, ACC: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * n_cols
    total = tl.zeros([BLOCK], ACC)
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row + col, mask=col < n_cols, other=0.0).to(ACC)
    mean = tl.sum(total, 0) / n_cols
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + col, mask=col < n_cols, other=0.0).to(ACC)
        tl.store(y_ptr + row + col, (x - mean).to(y_ptr.dtype.element_ty), mask=col < n_cols)


def center_rows_fwd(x: torch.Tensor) -> torch.Tensor:
    rows = x.contiguous()
    y = x.new_empty(x.shape)
    n = x.shape[-1]
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    _center_rows_kernel[(x.numel() // n,)](rows, y, n, ACC=acc, BLOCK=BLOCK, num_warps=4)
    return y


AOT = tuple(
    Entry(
        f"center_rows_fwd {dtype}",
        _center_rows_kernel,
        {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "n_cols": "i32"},
        {"ACC": tl.float32, "BLOCK": BLOCK},
        ("x_ptr", "y_ptr", "n_cols"),
    )
    for dtype in ("bf16", "fp32")
)
