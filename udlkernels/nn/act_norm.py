"""ActNorm: the invertible normalization of flows."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import functional as F
from udlkernels._errors import ArgumentError

_LEAST_DEVIATION = 1e-6


class ActNorm(torch.nn.Module):
    """An affine map of each channel that starts out as a normalization of its first batch.

    The first forward sets `log_scale` and `bias` so that every channel of its output has mean zero
    and deviation one; from then on they are ordinary parameters.

    Args:
        num_features: C, the channels of inputs [B, C, ...].

    Attributes:
        initialized: a buffer, whether the first batch was seen; part of the `state_dict`.
        implementation: passed to `act_norm`; "auto" unless set.
    """

    implementation: str = "auto"
    initialized: torch.Tensor

    def __init__(
        self,
        num_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.log_scale = torch.nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.tensor(False, device=device))
        self._ready = False  # what the buffer says, without asking the device for it

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mapped input, and the log-determinant [B]."""
        if not self._ready:
            self._initialize(input)
        return F.act_norm(input, self.log_scale, self.bias, implementation=self.implementation)

    def inverse(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` mapped to `output`, and the log-determinant of the way back."""
        bias = -self.bias * self.log_scale.exp()
        return F.act_norm(output, -self.log_scale, bias, implementation=self.implementation)

    def extra_repr(self) -> str:
        return str(self.num_features)

    @torch.no_grad()
    def _initialize(self, input: torch.Tensor) -> None:
        if not self.initialized:
            if input.dim() < 2 or input.shape[1] != self.num_features:
                expected = f"[B, {self.num_features}, ...]"
                raise ArgumentError("act_norm", "input", expected, list(input.shape))
            dims = [d for d in range(input.dim()) if d != 1]
            variance, mean = torch.var_mean(input.double(), dims, correction=0)
            self.bias.copy_(-mean)
            self.log_scale.copy_(-variance.sqrt().clamp_min(_LEAST_DEVIATION).log())
            self.initialized.fill_(True)
        self._ready = True

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._ready = False
