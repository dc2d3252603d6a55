"""Attention: kernels, formulas, and PyTorch's socket for them.

The public functions live in `udlkernels.functional`; `modifiers` are what they take as score_mod
and mask_mod, `patterns` make masks of blocks.
"""

from udlkernels.attention import modifiers, patterns
from udlkernels.attention.sockets import register

__all__ = ["modifiers", "patterns", "register"]
