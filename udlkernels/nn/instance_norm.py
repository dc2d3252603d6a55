"""InstanceNorm1d to 3d and their lazy forms: torch.nn's modules on our kernels."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import functional as F


class _OnOurKernels:
    """torch.nn's modules call this method with a batch of samples."""

    implementation: str = "auto"

    def _apply_instance_norm(self: Any, input: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            implementation=self.implementation,
        )


class InstanceNorm1d(_OnOurKernels, torch.nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d with its arguments and `state_dict`, computed by `instance_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """


class InstanceNorm2d(_OnOurKernels, torch.nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d with its arguments and `state_dict`, computed by `instance_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """


class InstanceNorm3d(_OnOurKernels, torch.nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d with its arguments and `state_dict`, computed by `instance_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """


class LazyInstanceNorm1d(_OnOurKernels, torch.nn.LazyInstanceNorm1d):
    """InstanceNorm1d whose number of channels comes from its first input."""

    cls_to_become = InstanceNorm1d  # type: ignore[assignment]


class LazyInstanceNorm2d(_OnOurKernels, torch.nn.LazyInstanceNorm2d):
    """InstanceNorm2d whose number of channels comes from its first input."""

    cls_to_become = InstanceNorm2d  # type: ignore[assignment]


class LazyInstanceNorm3d(_OnOurKernels, torch.nn.LazyInstanceNorm3d):
    """InstanceNorm3d whose number of channels comes from its first input."""

    cls_to_become = InstanceNorm3d  # type: ignore[assignment]
