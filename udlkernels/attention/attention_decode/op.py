"""attention_decode: choice of implementation, schemas, and what is written to the caches."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import _library
from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons, needs_grad
from udlkernels._errors import ArgumentError
from udlkernels.attention.attention import sdpa
from udlkernels.attention.attention.op import _wide
from udlkernels.attention.attention.reference import default_scale, limits
from udlkernels.attention.attention_decode import checks, reference


def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor | int,
    block_table: torch.Tensor | None = None,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    rotary: tuple[Any, ...] | None = None,
    causal: str | None = "bottom_right",
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    layout: str = "bthd",
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    r"""Attention of a few new queries over a cache of keys and values, which may lie in pages.

    .. math:: o_i = \sum_{j < L} \frac{e^{s_{ij}}}{e^{\text{sink}_h} + \sum_l e^{s_{il}}} v_j,
        \qquad s_{ij} = \text{cap}(\text{scale}\, q_i \cdot k_j) - \text{slope}_h |j - p_i|,
        \qquad p_i = L - T + i

    where L is the number of keys of the sample, the new ones included: the T queries are the last
    T positions, p_i that of query i. Key j of a paged sample lies in row j mod page_size of page
    block_table[j / page_size].

    Args:
        q: [B, T, H, D], float32, float64, bfloat16 or float16; D up to 512 for the kernels.
        k_cache: [B, S, Hkv, D] of q's type, Hkv divides H; or pages [pages, page_size, Hkv, D].
        v_cache: [B, S, Hkv, Dv], or [pages, page_size, Hkv, Dv].
        cache_seqlens: [B], int32 or int64, or an integer for all samples: how many keys the cache
            holds, before new ones are written.
        block_table: [B, P], int32 or int64: the pages of each sample, in order. Entries behind a
            sample's last key may be anything.
        k_new: [B, Tn, Hkv, D]: keys that are first written into the cache, in place, behind those
            it holds; only with v_new. No two samples may write to one page.
        v_new: [B, Tn, Hkv, Dv].
        rotary: (cos, sin) or (cos, sin, interleaved): tables [positions, R / 2] of angles. q and
            k_new are rotated by those of their position, a query before position 0 by those of
            0; pairs are (i, i + R / 2), or (2 i, 2 i + 1) where interleaved is True. Keys in the
            cache are taken as rotated.
        causal: "bottom_right": query i sees the keys up to its own position; None: all keys.
        window: (left, right), how many keys before and behind its own position a query sees.
        alibi_slopes: [H] or [B, H].
        softcap: bound of the scores before the slopes; None or 0 for none.
        sinks: [H], one more logit for each row, which joins the denominator only.
        scale: factor of the products; None for 1 / sqrt(D).
        layout: "bthd", or "bhtd" for q [B, H, T, D], caches [B, Hkv, S, D] or [pages, Hkv,
            page_size, D], k_new [B, Hkv, Tn, D].
        return_lse: also return the logarithm of each row's denominator.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [B, T, H, Dv] in the layout of q, contiguous, of q's type; with return_lse also the natural
        logarithm [B, H, T] in float32 (float64 for float64). A row that sees no key is 0, its
        logarithm -inf (or the sink).

    Raises:
        ArgumentError: shapes, types or devices that do not fit, one of k_new and v_new alone, an
            unknown causal or layout, a negative window; and on the CPU, where values are looked
            at, lengths outside of the cache, pages that do not exist, tables that are too short.
            The cache is then as it was.

    Numerical error: products, softmax and sums in float32 (float64 for float64), over chunks of
    512 keys counted from the first, merged in their order: a result's bits depend on neither the
    batch, the capacity nor the paging. Gradients come from the formula.

    Source: section 12.2; Kwon et al., 2023, "Efficient Memory Management for Large Language Model
    Serving with PagedAttention"; Su et al., 2021, "RoFormer".
    """
    if torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
        q = q.to(k_cache.dtype)
        k_new, v_new = (None if t is None else t.to(k_cache.dtype) for t in (k_new, v_new))
    heads_last = layout == "bthd"
    if not heads_last and layout != "bhtd":
        raise ArgumentError("attention_decode", "layout", "'bthd' or 'bhtd'", repr(layout))
    paged = block_table is not None
    checks.check_tensors(q, k_cache, v_cache, k_new, v_new, paged, heads_last)
    if heads_last:
        q, k_cache, v_cache = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        if k_new is not None and v_new is not None:
            k_new, v_new = k_new.transpose(1, 2), v_new.transpose(1, 2)
    return _checked(
        q, k_cache, v_cache, k_new, v_new, cache_seqlens, block_table, rotary, causal, window,
        alibi_slopes, softcap, sinks, scale, heads_last, return_lse, implementation,
    )  # fmt: skip


def _checked(
    q: Any, k_cache: Any, v_cache: Any, k_new: Any, v_new: Any, cache_seqlens: Any,
    block_table: Any, rotary: Any, causal: Any, window: Any, alibi_slopes: Any, softcap: Any,
    sinks: Any, scale: Any, heads_last: bool, return_lse: bool, implementation: str,
) -> Any:  # fmt: skip
    """The rest of the checks, the choice and the call; heads before the rows in all tensors."""
    checks.check_places(q, cache_seqlens, block_table, rotary)
    checks.check_options(q, causal, window, softcap, scale, alibi_slopes, sinks)
    kernel = _chooses_kernel(implementation, q, k_cache, v_cache, k_new, v_new, sinks, alibi_slopes)
    cos, sin, interleaved = (*(rotary or (None, None)), False)[:3]
    pages, _, page_size, _ = k_cache.shape
    new = 0 if k_new is None else k_new.shape[2]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    checks.check_values(
        cache_seqlens, new, page_size, pages, block_table, capacity,
        None if cos is None else cos.shape[0],
    )  # fmt: skip
    if isinstance(cache_seqlens, int):
        starts = q.new_full((q.shape[0],), cache_seqlens, dtype=torch.int64)
    else:
        starts = cache_seqlens.to(torch.int64).contiguous()
    lengths = starts + new if new else starts
    if block_table is not None:
        block_table = block_table.to(torch.int64).contiguous()
    if cos is not None:
        cos, sin = (_wide(table, q).contiguous() for table in (cos, sin))
    places = block_table, cos, sin, bool(interleaved)
    _, left, right = limits(causal, window, 0, 0)
    args = left, right, default_scale(q) if scale is None else scale, softcap or 0.0
    if kernel:
        if new:
            _append(k_cache, v_cache, k_new, v_new, starts, *places)
        found = _attend(q, k_cache, v_cache, lengths, places, alibi_slopes, sinks, args, heads_last)
    else:
        if new:
            reference.append(k_cache, v_cache, k_new, v_new, starts, *places)
        found = reference.attend_cached(
            q, k_cache, v_cache, lengths, *places, alibi_slopes, sinks, *args
        )
    out = found[0].transpose(1, 2) if heads_last else found[0]
    return (out, found[1]) if return_lse else out


def _chooses_kernel(
    implementation: str, q: Any, k_cache: Any, v_cache: Any, k_new: Any, v_new: Any, sinks: Any,
    alibi_slopes: Any,
) -> bool:  # fmt: skip
    tensors = q, k_cache, v_cache, k_new, v_new, sinks
    with_grad = needs_grad(*tensors, alibi_slopes)
    strided = k_new is not None and (k_cache.stride(3) != 1 or v_cache.stride(3) != 1)
    if (
        implementation in ("auto", "kernel")
        and kernel_ready(*tensors)
        and sdpa.kernel_takes(k_cache, v_cache)
        and not with_grad
        and not strided
    ):
        return True
    reasons = kernel_reasons(*tensors) + sdpa.kernel_takes_not(k_cache, v_cache)
    if with_grad:
        reasons.append("a gradient is needed, which comes from the formula")
    if strided:
        reasons.append("new keys cannot be written to a cache whose last dimension is strided")
    choice = choose(
        "attention_decode",
        implementation,
        reasons,
        fallback="reference",
        torch_reasons=("PyTorch has no such op",),
        inputs=describe(q, k_cache, v_cache),
    )
    return choice == "kernel"


def _append(k_cache: Any, v_cache: Any, k_new: Any, v_new: Any, *places: Any) -> None:
    k_new, v_new = (t if t.stride(3) == 1 else t.contiguous() for t in (k_new, v_new))
    APPEND(k_cache, v_cache, k_new, v_new, *places)
    if not (torch.compiler.is_compiling() or k_cache.is_inference() or v_cache.is_inference()):
        torch.autograd.graph.increment_version((k_cache, v_cache))


def _attend(
    q: Any, k_cache: Any, v_cache: Any, lengths: Any, places: Any, alibi_slopes: Any, sinks: Any,
    args: Any, heads_last: bool,
) -> Any:  # fmt: skip
    q, k_cache, v_cache = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k_cache, v_cache))
    if alibi_slopes is not None:
        alibi_slopes = _wide(alibi_slopes, q).expand(q.shape[:2]).contiguous()
    if sinks is not None:
        sinks = _wide(sinks, q).contiguous()
    return FWD(q, k_cache, v_cache, lengths, *places, alibi_slopes, sinks, *args, heads_last)


def _fake_append(*args: Any) -> None:
    """What is written changes no shape."""


def _fake_fwd(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *args: Any) -> Any:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = sdpa.result(q, v_cache.shape[3], args[-1])
    return out, q.new_empty(q.shape[:3], dtype=dtype)


APPEND = _library.define(
    "attention_decode_append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new,"
    " Tensor starts, Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved) -> ()",
    _fake_append,
)
FWD = _library.define(
    "attention_decode_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,"
    " Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved, Tensor? alibi_slopes,"
    " Tensor? sinks, int left, int right, float scale, float softcap, bool heads_last)"
    " -> (Tensor out, Tensor lse)",
    _fake_fwd,
)
_library.launchers(
    "udlkernels.attention.attention_decode.kernels",
    "attention_decode_append_",
    "attention_decode_fwd",
)
