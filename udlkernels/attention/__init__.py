"""Attention: kernels, formulas, and the sockets of PyTorch and transformers for them.

The public functions live in `udlkernels.functional`.
"""

from udlkernels.attention.sockets import register
from udlkernels.attention.transformers_socket import register_transformers

__all__ = ["register", "register_transformers"]
