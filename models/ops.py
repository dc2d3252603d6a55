"""The one way a model chooses its ops: the attribute `implementation` of its modules.

Every module of `udlkernels.nn` has it, and so has any module of a model file that calls
`udlkernels.functional` and hands `implementation=self.implementation` on.
"""

from typing import Any, Literal

from torch import nn

Ops = Literal["udlkernels", "torch", "reference"]

IMPLEMENTATIONS: dict[Ops, str] = {
    "udlkernels": "auto",
    "torch": "torch",
    "reference": "reference",
}


def set_implementation(model: nn.Module, ops: Ops) -> int:
    """Let `model` compute with `ops`; return how many of its modules have the choice."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "implementation")]
    for module in modules:
        module.implementation = IMPLEMENTATIONS[ops]
    return len(modules)
