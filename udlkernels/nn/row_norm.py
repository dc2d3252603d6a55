"""LayerNorm and RMSNorm: torch.nn's modules on our kernels."""

from __future__ import annotations

import torch

from udlkernels import functional as F


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm with its arguments and `state_dict`, computed by `layer_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """

    implementation: str = "auto"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            implementation=self.implementation,
        )


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm with its arguments and `state_dict`, computed by `rms_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """

    implementation: str = "auto"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, implementation=self.implementation
        )
