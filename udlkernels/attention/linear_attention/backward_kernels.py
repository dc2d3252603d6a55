"""The backward of linear attention: each row's denominator and dout . out, then dq, dk and dv.

With g = S dout + sum over j of (v_j . dout) phi(k_j), where S is the state, dout . out is
phi(q) . g over the denominator: the output itself is not needed. dk and dv start from the state of
queries, which is summed from the last chunk on. Each result has one owner: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from udlkernels.attention.linear_attention.chunk_kernels import (
    IDENTITY,
    PLAIN,
    dot,
    entries,
    linear_attention_sums_kernel,
    load_block,
    load_mapped,
    lower,
    mapped_gradient,
    products,
    state_of,
    store_block,
    through,
    weighed,
)


@triton.jit
def _row_values(ptr, head, first, tokens, CHUNK: tl.constexpr):
    i = first + tl.arange(0, CHUNK)
    return tl.load(ptr + head * tokens + i, mask=i < tokens, other=0.0)


@triton.jit(do_not_specialize=PLAIN)
def linear_attention_rows_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, kv_ptr, z_ptr, inverse_ptr, delta_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dout_b, dout_h, dout_t, kv_step, z_step,
    heads, group, tokens, chunks,
    FEATURE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """inverse = 1 / denominator (0 for 0) and delta = dout . out of CHUNK queries of one head."""
    chunk = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = head // heads, head % heads
    first = chunk * CHUNK
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h // group * k_h
    v_ptr += b * v_b + h // group * v_h
    dout_ptr += b * dout_b + h * dout_h
    kv_ptr, z_ptr = state_of(kv_ptr, z_ptr, kv_step, z_step, head // group, chunk, chunks, CAUSAL)
    divisor = weighed(q_ptr, q_t, first, tokens, z_ptr, D, BLOCK_D, CHUNK, FEATURE, ACC, WIDE)
    along = tl.zeros([CHUNK], ACC)
    for d in range(0, D, BLOCK_D):
        x = load_mapped(q_ptr, q_t, first, tokens, d, D, CHUNK, BLOCK_D, FEATURE, ACC, WIDE)
        g = through(
            dout_ptr, dout_t, first, tokens, kv_ptr, d, 1, DV, DV, D, BLOCK_DV, BLOCK_D, CHUNK,
            IDENTITY, PRECISION, ACC, WIDE,
        )  # fmt: skip
        along += tl.sum(x * g, 1)
    if CAUSAL:
        scores = products(
            q_ptr, q_t, k_ptr, k_t, first, tokens, D, BLOCK_D, CHUNK, FEATURE, PRECISION, ACC, WIDE
        )
        dots = products(
            dout_ptr, dout_t, v_ptr, v_t, first, tokens, DV, BLOCK_DV, CHUNK, IDENTITY, PRECISION,
            ACC, WIDE,
        )  # fmt: skip
        divisor += tl.sum(tl.where(lower(CHUNK), scores, 0.0), 1)
        along += tl.sum(tl.where(lower(CHUNK), scores * dots, 0.0), 1)
    empty = divisor == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, divisor))
    i = first + tl.arange(0, CHUNK)
    tl.store(inverse_ptr + head * tokens + i, inverse, mask=i < tokens)
    delta = tl.where(empty, 0.0, along * inverse)
    tl.store(delta_ptr + head * tokens + i, delta, mask=i < tokens)


@triton.jit(do_not_specialize=PLAIN)
def linear_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, kv_ptr, z_ptr, inverse_ptr, delta_ptr, dq_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dout_b, dout_h, dout_t, kv_step, z_step,
    heads, group, tokens, chunks,
    FEATURE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """CHUNK queries of one head, BLOCK_D columns."""
    chunk = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = head // heads, head % heads
    first, column = chunk * CHUNK, tl.program_id(1) * BLOCK_D
    v_ptr += b * v_b + h // group * v_h
    dout_ptr += b * dout_b + h * dout_h
    kv_ptr, z_ptr = state_of(kv_ptr, z_ptr, kv_step, z_step, head // group, chunk, chunks, CAUSAL)
    inverse = _row_values(inverse_ptr, head, first, tokens, CHUNK)
    delta = _row_values(delta_ptr, head, first, tokens, CHUNK)
    g = through(
        dout_ptr, dout_t, first, tokens, kv_ptr, column, 1, DV, DV, D, BLOCK_DV, BLOCK_D, CHUNK,
        IDENTITY, PRECISION, ACC, WIDE,
    )  # fmt: skip
    col = column + tl.arange(0, BLOCK_D)
    z = tl.load(z_ptr + col, mask=col < D, other=0.0)
    g = (g - delta[:, None] * z[None, :]) * inverse[:, None]
    if CAUSAL:
        dots = products(
            dout_ptr, dout_t, v_ptr, v_t, first, tokens, DV, BLOCK_DV, CHUNK, IDENTITY, PRECISION,
            ACC, WIDE,
        )  # fmt: skip
        dots = tl.where(lower(CHUNK), (dots - delta[:, None]) * inverse[:, None], 0.0)
        k_ptr += b * k_b + h // group * k_h
        y = load_mapped(k_ptr, k_t, first, tokens, column, D, CHUNK, BLOCK_D, FEATURE, ACC, WIDE)
        g = dot(dots, y, g, PRECISION)
    x = load_block(
        q_ptr + b * q_b + h * q_h, q_t, first, tokens, column, D, CHUNK, BLOCK_D, WIDE
    ).to(ACC)
    g = mapped_gradient(g, x, FEATURE)
    store_block(g, dq_ptr + head * tokens * D, D, first, tokens, column, D, CHUNK, BLOCK_D)


@triton.jit(do_not_specialize=PLAIN)
def linear_attention_dk_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, kv_ptr, z_ptr, inverse_ptr, delta_ptr, dk_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dout_b, dout_h, dout_t, kv_step, z_step,
    heads, group, tokens, chunks,
    FEATURE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """CHUNK keys of one key head, BLOCK_D columns, over the query heads of its group in order."""
    chunk = tl.program_id(0) % chunks
    state = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = state // heads, state % heads
    first, column = chunk * CHUNK, tl.program_id(1) * BLOCK_D
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    kv_ptr, z_ptr = state_of(kv_ptr, z_ptr, kv_step, z_step, state, chunk, chunks, CAUSAL)
    g = through(
        v_ptr, v_t, first, tokens, kv_ptr, column, 1, DV, DV, D, BLOCK_DV, BLOCK_D, CHUNK,
        IDENTITY, PRECISION, ACC, WIDE,
    )  # fmt: skip
    col = column + tl.arange(0, BLOCK_D)
    g += tl.load(z_ptr + col, mask=col < D, other=0.0)[None, :]
    if CAUSAL:
        for n in range(group):
            head = h * group + n
            dots = products(
                v_ptr, v_t, dout_ptr + b * dout_b + head * dout_h, dout_t, first, tokens, DV,
                BLOCK_DV, CHUNK, IDENTITY, PRECISION, ACC, WIDE,
            )  # fmt: skip
            row = b * heads * group + head
            inverse = _row_values(inverse_ptr, row, first, tokens, CHUNK)
            delta = _row_values(delta_ptr, row, first, tokens, CHUNK)
            dots = (dots - delta[None, :]) * inverse[None, :]
            dots = tl.where(tl.trans(lower(CHUNK)), dots, 0.0)
            x = load_mapped(
                q_ptr + b * q_b + head * q_h, q_t, first, tokens, column, D, CHUNK, BLOCK_D,
                FEATURE, ACC, WIDE,
            )  # fmt: skip
            g = dot(dots, x, g, PRECISION)
    x = load_block(k_ptr, k_t, first, tokens, column, D, CHUNK, BLOCK_D, WIDE).to(ACC)
    g = mapped_gradient(g, x, FEATURE)
    store_block(g, dk_ptr + state * tokens * D, D, first, tokens, column, D, CHUNK, BLOCK_D)


@triton.jit(do_not_specialize=PLAIN)
def linear_attention_dv_kernel(
    q_ptr, k_ptr, dout_ptr, kv_ptr, inverse_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, dout_b, dout_h, dout_t, kv_step, heads, group, tokens, chunks,
    FEATURE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """CHUNK keys of one key head, BLOCK_DV columns, over the query heads of its group in order."""
    chunk = tl.program_id(0) % chunks
    state = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = state // heads, state % heads
    first, column = chunk * CHUNK, tl.program_id(1) * BLOCK_DV
    k_ptr += b * k_b + h * k_h
    kv_ptr, _ = state_of(kv_ptr, kv_ptr, kv_step, kv_step, state, chunk, chunks, CAUSAL)
    g = through(
        k_ptr, k_t, first, tokens, kv_ptr, column, DV, 1, D, DV, BLOCK_D, BLOCK_DV, CHUNK, FEATURE,
        PRECISION, ACC, WIDE,
    )  # fmt: skip
    if CAUSAL:
        for n in range(group):
            head = h * group + n
            scores = products(
                k_ptr, k_t, q_ptr + b * q_b + head * q_h, q_t, first, tokens, D, BLOCK_D, CHUNK,
                FEATURE, PRECISION, ACC, WIDE,
            )  # fmt: skip
            row = b * heads * group + head
            inverse = _row_values(inverse_ptr, row, first, tokens, CHUNK)
            scores = tl.where(tl.trans(lower(CHUNK)), scores * inverse[None, :], 0.0)
            dout = load_block(
                dout_ptr + b * dout_b + head * dout_h, dout_t, first, tokens, column, DV, CHUNK,
                BLOCK_DV, WIDE,
            ).to(ACC)  # fmt: skip
            g = dot(scores, dout, g, PRECISION)
    store_block(g, dv_ptr + state * tokens * DV, DV, first, tokens, column, DV, CHUNK, BLOCK_DV)


AOT = tuple(
    found
    for exact in (False, True)
    for found in (
        *entries(linear_attention_sums_kernel, exact, TILES=1, WEIGHTED=True),
        *entries(linear_attention_rows_kernel, exact),
        *entries(linear_attention_dq_kernel, exact),
        *entries(linear_attention_dk_kernel, exact),
        *entries(linear_attention_dv_kernel, exact),
    )
)
