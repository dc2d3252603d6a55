"""Hand-written kernels for PyTorch: attention, convolution, message passing, normalization.

`udlkernels.functional` has torch.nn.functional's names, `udlkernels.nn` has torch.nn's; both are
drop-in. Every op has a C++ kernel for the CPU and a Triton kernel for the GPU, forward and
backward.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from udlkernels._errors import ArgumentError
from udlkernels._version import __version__

if TYPE_CHECKING:
    from udlkernels import functional, nn
    from udlkernels._accelerate import accelerate, accelerated, restore
    from udlkernels._explain import explain

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

# Names that need torch, and their modules: imported when first used, so that the command line can
# answer `--help` without it.
_LATER = {
    "accelerate": "udlkernels._accelerate",
    "accelerated": "udlkernels._accelerate",
    "explain": "udlkernels._explain",
    "functional": "udlkernels.functional",
    "nn": "udlkernels.nn",
    "restore": "udlkernels._accelerate",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
