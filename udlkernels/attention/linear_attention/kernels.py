"""Linear attention on a GPU: each chunk's own sums, what stands before each chunk, then the rows.

A chunk of queries meets the state that it starts from, and with a causal mask the triangle of
scores of its own chunk; without a mask all of them meet the one state after all keys. Widths are
cut into blocks, so that heads may be of any width. The order of a sum depends on the number of
tokens alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from udlkernels.attention.linear_attention import backward_kernels
from udlkernels.attention.linear_attention.backward_kernels import (
    linear_attention_dk_kernel,
    linear_attention_dq_kernel,
    linear_attention_dv_kernel,
    linear_attention_rows_kernel,
)
from udlkernels.attention.linear_attention.chunk_kernels import (
    PLAIN,
    SCAN_BLOCK,
    Problem,
    blocks,
    dot,
    entries,
    linear_attention_scan_kernel,
    linear_attention_sums_kernel,
    load_block,
    lower,
    products,
    state_of,
    store_block,
    strides,
    through,
    weighed,
)


@triton.jit(do_not_specialize=PLAIN)
def linear_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, kv_ptr, z_ptr, out_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, kv_step, z_step, heads, group, tokens, chunks,
    FEATURE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """CHUNK queries of one head, BLOCK_DV columns."""
    chunk = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = head // heads, head % heads
    first, column = chunk * CHUNK, tl.program_id(1) * BLOCK_DV
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h // group * k_h
    v_ptr += b * v_b + h // group * v_h
    kv_ptr, z_ptr = state_of(kv_ptr, z_ptr, kv_step, z_step, head // group, chunk, chunks, CAUSAL)
    total = through(
        q_ptr, q_t, first, tokens, kv_ptr, column, DV, 1, D, DV, BLOCK_D, BLOCK_DV, CHUNK, FEATURE,
        PRECISION, ACC, WIDE,
    )  # fmt: skip
    divisor = weighed(q_ptr, q_t, first, tokens, z_ptr, D, BLOCK_D, CHUNK, FEATURE, ACC, WIDE)
    if CAUSAL:
        scores = products(
            q_ptr, q_t, k_ptr, k_t, first, tokens, D, BLOCK_D, CHUNK, FEATURE, PRECISION, ACC, WIDE
        )
        scores = tl.where(lower(CHUNK), scores, 0.0)
        divisor += tl.sum(scores, 1)
        v = load_block(v_ptr, v_t, first, tokens, column, DV, CHUNK, BLOCK_DV, WIDE)
        total = dot(scores, v.to(ACC), total, PRECISION)
    empty = divisor == 0.0
    out = tl.where(empty[:, None], 0.0, total / tl.where(empty, 1.0, divisor)[:, None])
    store_block(out, out_ptr + head * tokens * DV, DV, first, tokens, column, DV, CHUNK, BLOCK_DV)


def linear_attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor | None,
    z: torch.Tensor | None, feature_map: int, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    problem = Problem(q, k, v, feature_map, causal)
    sums = _sums(problem, k, v, None, True)
    kv_out, z_out = _scan(problem, sums, kv, z, reverse=False)
    out = q.new_empty((*q.shape[:3], problem.value_width))
    starts, steps = problem.starts(sums, kv_out, z_out)
    common = problem.at(False)
    linear_attention_fwd_kernel[(problem.programs(q), blocks(common)[1])](
        q, k, v, *starts, out, *strides(q, k, v), *steps, *problem.counts(q),
        **common,
    )  # fmt: skip
    return out, kv_out, z_out


def _sums(
    problem: Problem, x: torch.Tensor, y: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor] | None, exact: bool,
) -> torch.Tensor:  # fmt: skip
    """Each chunk's sum of the outer products of x and y, [states, chunks, D Dv + D].

    With rows = (inverse, delta) x are queries, over their denominators and all heads of a group.
    """
    tokens = x.shape[2]
    tiles = problem.state_tiles
    chunks = triton.cdiv(tokens, problem.chunk * tiles)
    size = problem.width * problem.value_width + problem.width
    sums = x.new_empty((problem.states, chunks, size), dtype=problem.acc)
    common = problem.at_sums(exact)
    grid = problem.states * chunks, *blocks(common)
    linear_attention_sums_kernel[grid](
        x, y, *(rows or (x, x)), sums, *strides(x, y), problem.kv_heads,
        1 if rows is None else problem.group, tokens, chunks,
        TILES=tiles, WEIGHTED=rows is not None, **common,
    )  # fmt: skip
    return sums


def _scan(
    problem: Problem, sums: torch.Tensor, kv: torch.Tensor | None, z: torch.Tensor | None,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The state after all chunks; with a causal mask `sums` becomes what each chunk starts from."""
    batch, heads = problem.batch, problem.kv_heads
    kv_out = sums.new_empty((batch, heads, problem.width, problem.value_width))
    z_out = sums.new_empty((batch, heads, problem.width))
    states, chunks, size = sums.shape
    linear_attention_scan_kernel[(states * triton.cdiv(size, SCAN_BLOCK),)](
        sums, sums if kv is None else kv, sums if z is None else z, kv_out, z_out, size, chunks,
        problem.width, GIVEN=kv is not None, REVERSE=reverse, KEEP=problem.causal,
        BLOCK=SCAN_BLOCK, num_warps=4,
    )  # fmt: skip
    return kv_out, z_out


def linear_attention_bwd(
    dout: torch.Tensor, dkv_out: torch.Tensor | None, dz_out: torch.Tensor | None,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor | None,
    z: torch.Tensor | None, feature_map: int, causal: bool, need_dq: bool, need_dkv: bool,
    need_dstate: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk, dv, dkv, dz; what is not wanted comes back without elements."""
    problem = Problem(q, k, v, feature_map, causal)
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    problem.wide |= problem.is_wide(dout)
    dq, dk, dv, dkv, dz = (q.new_empty((0,), dtype=torch.float32) for _ in range(5))
    # A state's gradient is float32, so everything in front of it has to be.
    exact = need_dstate
    common = problem.at(exact)
    width_blocks, value_blocks = blocks(common)
    sums = None
    if causal:
        sums = _sums(problem, k, v, None, exact)
        _scan(problem, sums, kv, z, reverse=False)
    inverse, delta = q.new_empty((2, *q.shape[:3]), dtype=problem.acc)
    starts, steps = problem.starts(sums, kv, z)
    given = strides(q, k, v, dout)
    linear_attention_rows_kernel[(problem.programs(q),)](
        q, k, v, dout, *starts, inverse, delta, *given, *steps, *problem.counts(q),
        **problem.at(exact, "rows"),
    )  # fmt: skip
    if need_dq:
        dq = q.new_empty(q.shape)
        linear_attention_dq_kernel[(problem.programs(q), width_blocks)](
            q, k, v, dout, *starts, inverse, delta, dq, *given, *steps,
            *problem.counts(q), **common,
        )  # fmt: skip
    if not (need_dkv or need_dstate):
        return dq, dk, dv, dkv, dz
    sums = _sums(problem, q, dout, (inverse, delta), exact)
    dkv, dz = _scan(problem, sums, dkv_out, dz_out, reverse=True)
    if need_dkv:
        starts, steps = problem.starts(sums, dkv, dz)
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        linear_attention_dk_kernel[(problem.programs(k), width_blocks)](
            q, k, v, dout, *starts, inverse, delta, dk, *given, *steps,
            *problem.counts(k), **common,
        )  # fmt: skip
        linear_attention_dv_kernel[(problem.programs(v), value_blocks)](
            q, k, dout, starts[0], inverse, dv, *strides(q, k, dout), steps[0],
            *problem.counts(v), **common,
        )  # fmt: skip
    if not need_dstate:
        dkv, dz = (q.new_empty((0,), dtype=torch.float32) for _ in range(2))
    return dq, dk, dv, dkv, dz


AOT = (
    *entries(linear_attention_sums_kernel, True, TILES=1, WEIGHTED=False),
    *entries(linear_attention_sums_kernel, False, TILES=1, WEIGHTED=False),
    *entries(linear_attention_fwd_kernel),
    *backward_kernels.AOT,
)
