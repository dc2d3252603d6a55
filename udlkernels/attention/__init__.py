"""Attention: kernels, formulas, and PyTorch's socket for them.

The public functions live in `udlkernels.functional`.
"""

from udlkernels.attention.sockets import register

__all__ = ["register"]
