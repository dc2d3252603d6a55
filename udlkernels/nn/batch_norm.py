"""BatchNorm1d to 3d, their lazy forms and SyncBatchNorm: torch.nn's modules on our kernels."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist

from udlkernels import functional as F
from udlkernels.normalization.batch_norm.sync import choose_sync, sync_batch_norm

_TORCHS_ARGUMENTS = inspect.signature(torch.nn.SyncBatchNorm.__init__)


class _OnOurKernels:
    """torch.nn's forward, but for the function it calls."""

    implementation: str = "auto"

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        counts = self.training and self.track_running_stats and self.num_batches_tracked is not None
        if counts:
            self.num_batches_tracked.add_(1)
        keeps = not self.training or self.track_running_stats
        statistics = (self.running_mean, self.running_var) if keeps else (None, None)
        if counts and self.momentum is None:
            return self._cumulative(input, *statistics)
        return self._normalize(input, *statistics, 0.0 if self.momentum is None else self.momentum)

    def _cumulative(self: Any, input: torch.Tensor, *statistics: torch.Tensor) -> torch.Tensor:
        """The running statistics become the mean over all batches."""
        if not torch.compiler.is_compiling():
            return self._normalize(input, *statistics, 1.0 / float(self.num_batches_tracked))
        # Without reading the count, which would break the graph.
        batch = [torch.zeros_like(t) for t in statistics]
        y = self._normalize(input, *batch, 1.0)
        for running, new in zip(statistics, batch, strict=True):
            running.lerp_(new, (1.0 / self.num_batches_tracked).to(running.dtype))
        return y

    def _normalize(self: Any, input: torch.Tensor, mean: Any, var: Any, momentum: float) -> Any:
        return F.batch_norm(
            input,
            mean,
            var,
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


class SyncBatchNorm(_OnOurKernels, torch.nn.modules.batchnorm._BatchNorm):
    """torch.nn.SyncBatchNorm with its arguments and `state_dict`, on the CPU too.

    In training the batches of the group's processes are normalised as one, with any backend of
    torch.distributed. In evaluation, and where there is one process, it is BatchNorm.

    No subclass of torch's: DistributedDataParallel refuses those on the CPU, by their type.

    Attributes:
        implementation: "auto" unless set; "kernel", "torch" (on GPUs) or, for one process,
            "reference".
    """

    process_group: Any
    _check_input_dim: Any = torch.nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels: Any = torch.nn.SyncBatchNorm._check_non_zero_input_channels

    @functools.wraps(torch.nn.SyncBatchNorm.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **keywords: Any) -> None:
        given = _TORCHS_ARGUMENTS.bind(self, *args, **keywords).arguments
        del given["self"]
        group = given.pop("process_group", None)
        super().__init__(**given)
        self.process_group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        if self._group() is not None:
            tensors = self.running_mean, self.running_var, self.weight, self.bias
            if choose_sync(self.implementation, input, *tensors, self.eps) == "torch":
                return torch.nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        return super().forward(input)

    def _normalize(self, input: torch.Tensor, mean: Any, var: Any, momentum: float) -> Any:
        group = self._group()
        if group is None:
            return super()._normalize(input, mean, var, momentum)
        return sync_batch_norm(input, mean, var, self.weight, self.bias, momentum, self.eps, group)

    def _group(self) -> Any:
        """The processes whose batches count as one; None where this one stands alone."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> Any:
        """torch's conversion of every BatchNorm of a model, into this class."""
        converted: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for part in converted.modules():
            if type(part) is torch.nn.SyncBatchNorm:
                part.__class__ = cls  # type: ignore[assignment]
        return converted
