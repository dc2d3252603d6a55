"""The attention family: its declarations, one file an op, and the goals set for them."""

from __future__ import annotations

import torch

from ..declaration import Case, OverheadCase

_FP32, _BF16 = torch.float32, torch.bfloat16

CASES = (
    Case("scaled_dot_product_attention", "forward", _FP32, goal=2.5, share=0.85),
    Case("scaled_dot_product_attention", "forward", _BF16, goal=4.5, share=0.80),
    Case("scaled_dot_product_attention", "backward", _FP32, goal=2.7, share=0.85),
    Case("scaled_dot_product_attention", "backward", _BF16, goal=3.0, share=0.60),
    Case("attention", "step", _FP32, goal=2.0),
    Case("multi_head_attention_forward", "step", _FP32),
    Case("multi_head_attention_forward", "step", _BF16),
)

OVERHEAD_CASES = (
    OverheadCase("scaled_dot_product_attention", "forward", 2.0),
    OverheadCase("scaled_dot_product_attention", "step", 4.0),
)
