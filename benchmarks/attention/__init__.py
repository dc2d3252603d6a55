"""The attention family: its declarations, one file an op, and the goals set for them."""

from __future__ import annotations

import torch

from ..declaration import Case, OverheadCase

_FP32, _BF16 = torch.float32, torch.bfloat16
_BOTH = (_FP32, _BF16)
_SDPA = "scaled_dot_product_attention"
_LONG, _SHORT = "T>=2048", "T512"
_DENSE = "dense (ours)"

CASES = (
    Case(_SDPA, "forward", _FP32, 2.5, 0.85, where=("full", _LONG)),
    Case(_SDPA, "forward", _FP32, 2.8, 0.80, where=("causal", _LONG)),
    Case(_SDPA, "forward", _FP32, 2.5, 0.75, where=("full", _SHORT)),
    Case(_SDPA, "forward", _FP32, 2.8, 0.65, where=("causal", _SHORT)),
    Case(_SDPA, "backward", _FP32, 2.7, 0.85, where=("full", _LONG)),
    Case(_SDPA, "backward", _FP32, 3.2, 0.80, where=("causal", _LONG)),
    Case(_SDPA, "backward", _FP32, 2.7, 0.75, where=("full", _SHORT)),
    Case(_SDPA, "backward", _FP32, 3.2, 0.65, where=("causal", _SHORT)),
    Case(_SDPA, "forward", _BF16, 4.5, 0.80, where=("full", _LONG)),
    Case(_SDPA, "forward", _BF16, 5.0, 0.75, where=("causal", _LONG)),
    Case(_SDPA, "forward", _BF16, 4.5, 0.60, where=("full", _SHORT)),
    Case(_SDPA, "forward", _BF16, 5.0, 0.50, where=("causal", _SHORT)),
    *(
        Case(_SDPA, "backward", _BF16, 3.0, 0.60, where=(mask, length))
        for length in (_LONG, _SHORT)
        for mask in ("full", "causal")
    ),
    *(
        Case(op, phase, dtype, 2.0, where=(model,))
        for op, model in ((_SDPA, "vit"), ("attention", "swin"), (_SDPA, "bert"))
        for phase in ("forward", "step")
        for dtype in _BOTH
    ),
    # In a window of 49 tokens, queries, keys and values alone are more than a quarter.
    *(Case("attention", "step", dtype, 2.0) for dtype in _BOTH),
    *(Case("attention", "step", dtype, 2.0, memory=0.25, where=("T>=256",)) for dtype in _BOTH),
    Case("attention_decode", "forward", _FP32, 1.8, 0.85),
    Case("attention_decode", "forward", _BF16, 10.0, 0.85),
    *(
        case
        for phase in ("forward", "step")
        for dtype in _BOTH
        for case in (
            Case("attention_varlen", phase, dtype, 3.0, where=("spread",)),
            Case(
                "attention_varlen", phase, dtype, 0.85, where=("spread",), peer=_DENSE,
                per_flop=True,
            ),
            Case("block_sparse_attention", phase, dtype, 6.0, where=("tenth",), peer=_DENSE),
        )
    ),
    Case("multi_head_attention_forward", "step", _FP32),
    Case("multi_head_attention_forward", "step", _BF16),
)  # fmt: skip

OVERHEAD_CASES = (
    OverheadCase(_SDPA, "forward", 2.0),
    OverheadCase(_SDPA, "step", 4.0),
    OverheadCase("attention", "forward", 2.0),
    OverheadCase("attention", "step", 4.0),
)
