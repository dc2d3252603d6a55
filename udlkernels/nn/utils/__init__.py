"""torch.nn.utils' names on our kernels."""

from udlkernels.nn.utils import parametrizations

__all__ = ["parametrizations"]
