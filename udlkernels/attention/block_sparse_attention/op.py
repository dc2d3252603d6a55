"""block_sparse_attention: checks and choice; its kernels are those of attention."""

from __future__ import annotations

import math
from typing import Any

import torch

from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons
from udlkernels._errors import ArgumentError
from udlkernels.attention.attention import checks, sdpa
from udlkernels.attention.attention.op import _attend
from udlkernels.attention.attention.reference import default_scale, limits
from udlkernels.attention.block_sparse_attention import reference

_OP = "block_sparse_attention"


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    *,
    block_size: int,
    causal: str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Any:
    r"""Attention in which blocks of queries see blocks of keys; the others cost nothing.

    .. math:: o_i = \sum_{j:\ \text{mask}[\lfloor i / b \rfloor, \lfloor j / b \rfloor]}
        \frac{e^{s_{ij}}}{\sum_l e^{s_{il}}} v_j, \qquad s_{ij} = \text{scale}\, q_i \cdot k_j

    `udlkernels.attention.patterns` makes masks. On a GPU whole tiles of 64 x 64 are left out where
    block_size is a multiple of 64 and the type has 16 bits; other sizes look at the mask inside of
    a tile too.

    Args:
        q: [B, H, T, D], float32, float64, bfloat16 or float16; D up to 512 for the kernels.
        k: [B, Hkv, S, D] of q's type; Hkv divides H, and H / Hkv query heads in a row share a head.
        v: [B, Hkv, S, Dv] of q's type.
        block_mask: bool, [ceil(T / b), ceil(S / b)] or [B or 1, H or 1, ceil(T / b), ceil(S / b)];
            True where the block's queries see the block's keys.
        block_size: b, how many queries, and how many keys, a block has; the last may have fewer.
        causal: None, "top_left" or "bottom_right", as in attention, in addition to the mask.
        scale: factor of the products; None for 1 / sqrt(D).
        return_lse: also return the logarithm of each row's denominator; it has a gradient.
        implementation: "auto", "kernel" or "reference"; PyTorch has no such op.

    Returns:
        [B, H, T, Dv], contiguous, of q's type; with return_lse also the natural logarithm
        [B, H, T] in float32 (float64 for float64). A row that sees no key is 0, its logarithm -inf.

    Raises:
        ArgumentError: shapes, types or devices that do not fit, a mask that is not bool, a
            block_size below 1, an unknown causal.

    Numerical error: as attention; what a query does not see is never multiplied, be it NaN.

    Source: section 12.9; Child et al., 2019, "Generating long sequences with sparse transformers".
    """
    if not checks.fits(q, k, v, False):
        checks.check_tensors(q, k, v, False, _OP)
    block_mask = _checked(q, k, block_mask, block_size, causal, scale)
    if not (
        implementation in ("auto", "kernel") and kernel_ready(q, k, v) and sdpa.kernel_takes(k, v)
    ):
        choice = choose(
            _OP,
            implementation,
            kernel_reasons(q, k, v) + sdpa.kernel_takes_not(k, v),
            fallback="reference",
            torch_reasons=("PyTorch has no such op",),
            inputs=describe(q, k, v, block_mask),
        )
        if choice == "reference":
            return reference.block_sparse_attention(
                q, k, v, block_mask, block_size=block_size, causal=causal, scale=scale,
                return_lse=return_lse,
            )  # fmt: skip
    return _attend(
        q, k, v, None, None, None, None, None, *limits(causal, None, q.shape[2], k.shape[2]),
        default_scale(q) if scale is None else scale, 0.0, 0.0, None, False, return_lse,
        block_mask=block_mask, block_size=block_size,
    )  # fmt: skip


def _checked(
    q: torch.Tensor, k: torch.Tensor, block_mask: Any, block_size: Any, causal: Any, scale: Any
) -> torch.Tensor:
    """The mask with four dimensions, of arguments that fit together."""
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ArgumentError(_OP, "block_size", "an integer >= 1", repr(block_size))
    if not isinstance(block_mask, torch.Tensor):
        hint = " (a pattern's is its .mask)" if hasattr(block_mask, "mask") else ""
        raise ArgumentError(_OP, "block_mask", f"a bool tensor{hint}", type(block_mask).__name__)
    blocks = [-(-n // block_size) for n in (q.shape[2], k.shape[2])]
    batch, heads = q.shape[:2]
    shape = block_mask.shape
    shared = len(shape) == 2 or (
        len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads)
    )
    if not (block_mask.dtype == torch.bool and list(shape[-2:]) == blocks and shared):
        wanted = (
            f"bool, shape {blocks} or [{batch} or 1, {heads} or 1, {blocks[0]}, {blocks[1]}]"
            f" (blocks of {block_size})"
        )
        raise ArgumentError(_OP, "block_mask", wanted, describe(block_mask))
    if block_mask.device != q.device:
        wanted = f"a tensor on {q.device} (q's device)"
        raise ArgumentError(_OP, "block_mask", wanted, block_mask.device)
    if causal not in checks.ALIGNMENTS:
        raise ArgumentError(_OP, "causal", f"one of {checks.ALIGNMENTS}", repr(causal))
    if scale is not None and not -math.inf < scale < math.inf:
        raise ArgumentError(_OP, "scale", "None or a finite number", scale)
    return block_mask if len(shape) == 4 else block_mask[None, None]
