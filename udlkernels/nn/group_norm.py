"""GroupNorm: torch.nn's module on our kernels."""

from __future__ import annotations

import torch

from udlkernels import functional as F


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm with its arguments and `state_dict`, computed by `group_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """

    implementation: str = "auto"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            implementation=self.implementation,
        )
