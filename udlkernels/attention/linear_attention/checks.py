"""What `linear_attention` asks of its arguments."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels._dispatch import describe
from udlkernels._errors import ArgumentError
from udlkernels.attention.attention.checks import check_tensors, fits
from udlkernels.attention.linear_attention.reference import FEATURE_MAPS

OP = "linear_attention"


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: Any, causal: bool, state: Any
) -> None:
    """Raises for what no implementation can take; q and k as they go into the products."""
    if not fits(q, k, v, False):
        check_tensors(q, k, v, False, OP)
    if not isinstance(feature_map, str) or feature_map not in FEATURE_MAPS:
        wanted = f"a function or one of {tuple(FEATURE_MAPS)}"
        raise ArgumentError(OP, "feature_map", wanted, repr(feature_map))
    if causal and q.shape[2] != k.shape[2]:
        wanted = f"{q.shape[2]} rows (q's) with a causal mask, [B, H, T, D]"
        raise ArgumentError(OP, "k", wanted, list(k.shape))
    if state is not None:
        _check_state(q, k, v, state)


def _check_state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Any) -> None:
    pair = isinstance(state, (tuple, list)) and len(state) == 2
    if not pair or not all(isinstance(t, torch.Tensor) for t in state):
        raise ArgumentError(OP, "state", "a pair of tensors (kv, z)", type(state).__name__)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, _, width = k.shape
    shapes = (batch, heads, width, v.shape[3]), (batch, heads, width)
    for name, tensor, shape in zip(("kv", "z"), state, shapes, strict=True):
        if tensor.dtype != wide or tensor.shape != shape:
            wanted = f"{name} of {wide}, shape {list(shape)}"
            raise ArgumentError(OP, "state", wanted, describe(tensor))
        if tensor.device != q.device:
            wanted = f"tensors on {q.device} (q's device)"
            raise ArgumentError(OP, "state", wanted, tensor.device)
