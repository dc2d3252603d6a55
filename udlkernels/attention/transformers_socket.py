"""Our attention under the name "udlkernels" in the transformers library."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from udlkernels._errors import ArgumentError
from udlkernels.attention.attention.op import attention

NAME = "udlkernels"
# Keyword arguments that change the result, and that we cannot serve.
_REFUSED = {
    "output_attentions": "False (the weights are never held in memory; 'eager' returns them)",
    "sinks": "None (sinks of one number a head come as s_aux)",
    "block_indices": "None (no choice of blocks)",
    "block_table": "None (no continuous batching)",
    "read_index": "None (no continuous batching)",
}


def register_transformers() -> None:
    """Makes "udlkernels" an attention implementation of transformers, with its masks.

    A model then takes it by `attn_implementation="udlkernels"`, or later by
    `model.set_attn_implementation("udlkernels")`. Grouped heads are not repeated; windows, softcap,
    sinks, position bias and dropout run in the kernels. Masks are those of transformers' "sdpa".
    Imports transformers, which takes seconds.

    Raises:
        ArgumentError: transformers is not installed, or has no interface for masks.
    """
    if importlib.util.find_spec("transformers") is None:
        wanted = "the package to be installed (pip install 'udlkernels[interop]')"
        raise ArgumentError("register", "transformers", wanted, "none")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        import transformers

        wanted = "a version with AttentionMaskInterface (5 is tested)"
        raise ArgumentError("register", "transformers", wanted, transformers.__version__) from None
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: q [B, H, T, D], k and v [B, Hkv, S, D], to ([B, T, H, D], None).

    The mask, where there is one, says everything about what a query sees. There is none for whole
    causal sequences and for a single query; a StaticCache may then be longer than the queries,
    which are its first positions.
    """
    _refuse(others)
    mask, bias = _split(attention_mask, position_bias)
    causal = window = None
    if attention_mask is None:
        several = query.shape[2] > 1
        if several and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            causal = "top_left"
        elif not several and sliding_window is not None:
            causal = "bottom_right"
        if causal is not None and sliding_window is not None:
            window = (sliding_window - 1, None)
    out = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=causal,
        window=window, mask=mask, bias=bias, softcap=softcap, sinks=s_aux, scale=scaling,
        dropout_p=dropout, layout="bthd",
    )  # fmt: skip
    return out.contiguous(), None


def _refuse(others: dict[str, Any]) -> None:
    for name, expected in _REFUSED.items():
        given = others.get(name)
        if given is not None and given is not False:
            got = "a tensor" if isinstance(given, torch.Tensor) else repr(given)
            raise ArgumentError(NAME, name, expected, got)


def _split(
    mask: torch.Tensor | None, position_bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(mask, bias) of a mask that is boolean or added to the scores, and a bias or none."""
    if mask is None or mask.dtype == torch.bool:
        return mask, position_bias
    return None, mask if position_bias is None else mask + position_bias
