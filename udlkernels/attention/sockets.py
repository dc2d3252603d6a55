"""Our kernels behind PyTorch's own `scaled_dot_product_attention`, for code that is not changed."""

from __future__ import annotations

import sys
from typing import Any

import torch

from udlkernels._errors import ArgumentError
from udlkernels._library import ready
from udlkernels.attention.attention.op import BWD, FWD
from udlkernels.attention.attention.reference import NO_LIMIT, default_scale
from udlkernels.attention.transformers_socket import NAME, register_transformers

_OP = "_scaled_dot_product_flash_attention_for_cpu"


def register() -> None:
    """Makes "udlkernels" a flash attention implementation of PyTorch; activates nothing.

    After `torch.nn.attention.activate_flash_attention_impl("udlkernels")` every call of
    `torch.nn.functional.scaled_dot_product_attention` on CPU tensors that PyTorch sends to its
    fused kernel (four dimensions, no dropout, no gradient to the mask) runs on ours, forward and
    backward, eager and compiled. `torch.nn.attention.restore_flash_attention_impl()` undoes it.

    Where transformers is imported already, this is `register_transformers` too.

    Raises:
        ArgumentError: the C++ kernels are not there.
    """
    from torch.nn.attention import register_flash_attention_impl

    if not ready.cpu:
        raise ArgumentError("register", "extension", "the C++ kernels", "none (see doctor)")
    register_flash_attention_impl(NAME, register_fn=_Active)
    if "transformers" in sys.modules:
        register_transformers()


class _Active:
    """Keeps the registration alive until it is removed."""

    def __init__(self) -> None:
        self._library: Any = torch.library.Library("aten", "IMPL")
        self._library.impl(_OP, _forward, "CPU", allow_override=True)
        self._library.impl(f"{_OP}_backward", _backward, "CPU", allow_override=True)

    def remove(self) -> None:
        self._library._destroy()
        self._library = None


def _options(q: torch.Tensor, k: torch.Tensor, mask: Any, causal: bool, scale: Any) -> Any:
    """The ops' arguments behind q, k and v, without the last."""
    boolean = bias = None
    if mask is not None:
        expanded = mask.expand(*q.shape[:3], k.shape[2])
        boolean, bias = (expanded, None) if mask.dtype == torch.bool else (None, expanded)
    right = 0 if causal else NO_LIMIT
    factor = default_scale(q) if scale is None else scale
    extras = boolean, bias, None, None, None, None, None, 0
    return *extras, 0, NO_LIMIT, right, factor, 0.0, 0.0, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = _options(q, k, attn_mask, is_causal, scale)
    # Compiled code relies on PyTorch's strides: the output's are those of q, and the logarithms lie
    # as [B, T, H].
    heads_last = not q.is_contiguous() and q.transpose(1, 2).is_contiguous()
    out, lse = FWD(_rows(q), _rows(k), _rows(v), *options, heads_last)
    if not (heads_last or q.is_contiguous()):
        out = torch.empty_like(q).copy_(out)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    options = _options(q, k, attn_mask, is_causal, scale)
    rows = (_rows(x) for x in (q, k, v, out))
    found = BWD(
        _rows(grad_out), None, *rows, logsumexp.contiguous(), *options, True,
        True, True, False, False,
    )  # fmt: skip
    return found[0], found[1], found[2]
