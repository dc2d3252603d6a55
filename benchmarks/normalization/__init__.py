"""The normalization family: its declarations, one file an op, and the goals set for them."""

from __future__ import annotations

import torch

from ..declaration import Case, OverheadCase

_FP32, _BF16 = torch.float32, torch.bfloat16
_NCHW, _NHWC = "contiguous", "channels_last"

CASES = (
    Case("layer_norm", "forward", _FP32, goal=1.5, share=0.85),
    Case("layer_norm", "forward", _BF16, goal=4.0),
    Case("layer_norm", "step", _FP32, goal=1.5),
    Case("layer_norm", "step", _BF16, goal=4.0),
    Case("rms_norm", "step", _FP32, goal=9.0),
    Case("rms_norm", "step", _BF16, goal=18.0),
    Case("add_layer_norm", "step", _FP32, goal=1.8),
    Case("add_layer_norm", "step", _BF16, goal=1.8),
    Case("add_rms_norm", "step", _FP32, goal=8.0),
    Case("add_rms_norm", "step", _BF16, goal=8.0),
    Case("batch_norm", "step", _FP32, goal=2.8, layout=_NCHW),
    Case("batch_norm", "step", _FP32, goal=1.3, layout=_NHWC),
    Case("batch_norm_act", "step", _FP32, goal=3.5, layout=_NCHW),
    Case("batch_norm_act", "step", _FP32, goal=3.5, layout=_NHWC),
    Case("group_norm", "step", _FP32, goal=1.5, layout=_NCHW),
    Case("group_norm", "step", _FP32, goal=5.0, layout=_NHWC),
    Case("group_norm", "step", _BF16, goal=15.0, layout=_NHWC),
    Case("group_norm_act", "step", _FP32, goal=2.0, layout=_NCHW),
    Case("group_norm_act", "step", _FP32, goal=2.0, layout=_NHWC),
    Case("instance_norm", "step", _FP32, goal=2.0, layout=_NCHW),
    Case("instance_norm", "step", _FP32, goal=3.0, layout=_NHWC),
    Case("local_response_norm", "step", _FP32, goal=4.0),
    Case("local_response_norm", "step", _BF16, goal=4.0),
)

OVERHEAD_CASES = tuple(
    OverheadCase(op, phase, extra_us)
    for op, forward, step in (
        ("layer_norm", 2.0, 4.0),
        ("rms_norm", 0.0, 0.0),
        ("batch_norm", 2.0, 4.0),
        ("group_norm", 2.0, 4.0),
        ("instance_norm", 2.0, 4.0),
        ("local_response_norm", 2.0, 4.0),
    )
    for phase, extra_us in (("forward", forward), ("step", step))
)
