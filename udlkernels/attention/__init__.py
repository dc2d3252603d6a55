"""Attention: kernels, formulas, and the sockets of PyTorch and transformers for them.

The public functions live in `udlkernels.functional`; `modifiers` are what they take as score_mod
and mask_mod, `patterns` make masks of blocks, the indices serve `relative_position_bias`.
"""

from udlkernels.attention import modifiers, patterns
from udlkernels.attention.relative_position_bias.index import swin_index, t5_index
from udlkernels.attention.sockets import register
from udlkernels.attention.transformers_socket import register_transformers

__all__ = [
    "modifiers",
    "patterns",
    "register",
    "register_transformers",
    "swin_index",
    "t5_index",
]
