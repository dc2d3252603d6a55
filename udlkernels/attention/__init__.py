"""Attention: kernels, formulas, PyTorch's socket for them, and indices of relative positions.
"""Attention: kernels, formulas, and the sockets of PyTorch and transformers for them.

The public functions live in `udlkernels.functional`.
"""

from udlkernels.attention.relative_position_bias.index import swin_index, t5_index
from udlkernels.attention.sockets import register
from udlkernels.attention.transformers_socket import register_transformers

__all__ = ["register", "swin_index", "t5_index"]
__all__ = ["register", "register_transformers"]
