"""LocalResponseNorm: torch.nn's module on our kernels."""

from __future__ import annotations

import torch

from udlkernels import functional as F


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """torch.nn.LocalResponseNorm with its arguments, computed by `local_response_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """

    implementation: str = "auto"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.local_response_norm(
            input, self.size, self.alpha, self.beta, self.k, implementation=self.implementation
        )
