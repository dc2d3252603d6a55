"""Attention: kernels, formulas, PyTorch's socket for them, and indices of relative positions.

The public functions live in `udlkernels.functional`.
"""

from udlkernels.attention.relative_position_bias.index import swin_index, t5_index
from udlkernels.attention.sockets import register

__all__ = ["register", "swin_index", "t5_index"]
