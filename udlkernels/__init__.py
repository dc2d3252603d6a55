"""Hand-written kernels for PyTorch: attention, convolution, message passing, normalization.

`udlkernels.functional` has torch.nn.functional's names, `udlkernels.nn` has torch.nn's; both are
drop-in. Every op has a C++ kernel for the CPU and a Triton kernel for the GPU, forward and backward.
"""

from pathlib import Path

from udlkernels import functional, nn
from udlkernels._accelerate import accelerate, accelerated, restore
from udlkernels._errors import ArgumentError
from udlkernels._explain import explain
from udlkernels._version import __version__

# In a checkout models/ and benchmarks/ lie beside the package, not in it as when installed.
_package = Path(__file__).parent
if not (_package / "models").is_dir():
    __path__.append(str(_package.parent))

__all__ = [
    "ArgumentError",
    "__version__",
    "accelerate",
    "accelerated",
    "explain",
    "functional",
    "nn",
    "restore",
]
