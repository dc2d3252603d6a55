"""Attention over packed sequences on a GPU: the kernels of attention, which find their sequence.

The rows of all sequences are one sample in memory. A program looks up which sequence its tile
belongs to, and works on that one's rows as if they were all: the same tiles, the same order of
every sum, the same bits as `attention` on it alone.
"""

from __future__ import annotations

from typing import Any

import torch

from udlkernels.attention.attention.backward_kernels import (
    attention_dkdv_kernel,
    attention_dq_kernel,
)
from udlkernels.attention.attention.kernels import (
    attention_fwd_kernel,
    launch_delta,
    launch_dkdv,
    launch_dq,
    launch_dsinks,
    launch_fwd,
)
from udlkernels.attention.attention.tile_kernels import (
    ALIBI,
    LEFT,
    PACKED_HALF,
    PACKED_HEAVY,
    PACKED_SINGLE,
    RIGHT,
    SOFTCAP,
    WIDE_STRIDE,
    Problem,
    entry,
)


def _one_sample(x: torch.Tensor) -> torch.Tensor:
    """[N, H, D] as [1, H, N, D]."""
    return x.transpose(0, 1)[None]


def _problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None,
    causal: int, *numbers: Any,
) -> Problem:  # fmt: skip
    return Problem(
        *(_one_sample(x) for x in (q, k, v)), None, None, None, alibi_slopes, sinks, causal,
        *numbers, cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
    )  # fmt: skip


def attention_varlen_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None,
    causal: int, left: int, right: int, scale: float, softcap: float, dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    problem = _problem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, causal, left, right, scale,
        softcap, dropout_p, seed,
    )  # fmt: skip
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    return out, launch_fwd(problem, sinks, _one_sample(out))[0]


def attention_varlen_bwd(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None,
    causal: int, left: int, right: int, scale: float, softcap: float, dropout_p: float,
    seed: torch.Tensor | None, need_dq: bool, need_dkv: bool, need_dsinks: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    problem = _problem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, None, causal, left, right, scale,
        softcap, dropout_p, seed,
    )  # fmt: skip
    dout = _one_sample(dout if dout.stride(2) == 1 else dout.contiguous())
    problem.constexprs["WIDE"] |= dout.stride(2) >= WIDE_STRIDE
    dq, dk, dv, dsinks = (q.new_empty((0,), dtype=torch.float32) for _ in range(4))
    rows = lse.contiguous(), launch_delta(problem, dout, dlse, _one_sample(out))
    if need_dkv:
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        launch_dkdv(problem, dout, rows, _one_sample(dk), _one_sample(dv))
    if need_dq:
        dq = q.new_empty(q.shape)
        launch_dq(problem, dout, rows, _one_sample(dq), None)
    if need_dsinks and sinks is not None:
        dsinks = launch_dsinks(problem, sinks, rows)
    return dq, dk, dv, dsinks


_BANDED = ALIBI.value | SOFTCAP.value | LEFT.value | RIGHT.value
_LAUNCHES = (
    ("bf16", PACKED_HALF, "plain", 0, False),
    ("bf16", PACKED_HALF, "causal", RIGHT.value, False),
    ("bf16", PACKED_HEAVY, "band softcap slopes", _BANDED, False),
    ("bf16", PACKED_HEAVY[1:2], "causal dropout", RIGHT.value, True),
    ("fp32", PACKED_SINGLE, "causal", RIGHT.value, False),
)
# In float32 the backward of heads beyond 128 wide spills, as attention's does, and the forward of
# those beyond 256 (40 bytes); such launches are not declared.
_WIDEST_SINGLE = {attention_fwd_kernel: 256}
AOT = tuple(
    entry(fn, label, dtype, row.limit, tile, mode, drop, packed=True, **special)
    for dtype, table, label, mode, drop in _LAUNCHES
    for row in table
    for fn, tile, special in (
        (attention_fwd_kernel, row.forward, dict(FOLD=not mode & _BANDED & ~RIGHT.value)),
        (attention_dkdv_kernel, row.dkdv, dict(SCALE=0.0)),
        (attention_dq_kernel, row.dq, dict(SCALE=0.0, DBIAS=False)),
    )
    if dtype == "bf16" or row.limit <= _WIDEST_SINGLE.get(fn, 128)
)
