"""BatchNorm1d to 3d and their lazy forms: torch.nn's modules on our kernels."""

from __future__ import annotations

from typing import Any

import torch

from udlkernels import functional as F


class _OnOurKernels:
    """torch.nn's forward, but for the function it calls."""

    implementation: str = "auto"

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        keeps = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            implementation=self.implementation,
        )


class BatchNorm1d(_OnOurKernels, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d with its arguments and `state_dict`, computed by `batch_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """


class BatchNorm2d(_OnOurKernels, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with its arguments and `state_dict`, computed by `batch_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """


class BatchNorm3d(_OnOurKernels, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d with its arguments and `state_dict`, computed by `batch_norm`.

    Attributes:
        implementation: passed to the function; "auto" unless set.
    """


class LazyBatchNorm1d(_OnOurKernels, torch.nn.LazyBatchNorm1d):
    """BatchNorm1d whose number of channels comes from its first input."""

    cls_to_become = BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(_OnOurKernels, torch.nn.LazyBatchNorm2d):
    """BatchNorm2d whose number of channels comes from its first input."""

    cls_to_become = BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(_OnOurKernels, torch.nn.LazyBatchNorm3d):
    """BatchNorm3d whose number of channels comes from its first input."""

    cls_to_become = BatchNorm3d  # type: ignore[assignment]
