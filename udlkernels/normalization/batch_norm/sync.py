"""Batch normalization over the batches of all processes of a group, on the CPU and on GPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from udlkernels._dispatch import choose, describe, kernel_ready, kernel_reasons
from udlkernels._errors import ArgumentError
from udlkernels.normalization.batch_norm import op

_NO_TORCH = ("PyTorch's SyncBatchNorm takes GPU tensors only",)


def choose_sync(
    implementation: str,
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> str:
    """ "kernel" or "torch", for a batch that is spread over several processes.

    Raises:
        ArgumentError: neither can serve, or "reference" was asked for.
    """
    tensors = running_mean, running_var, weight, bias
    # Of how many values a process holds only the sum over all of them counts.
    probe = x.new_empty((2, *x.shape[1:2], *(1,) * (x.dim() - 2)))
    reasons = op.reasons_for(probe, *tensors, True, 0.0, eps)
    if not reasons and implementation in ("auto", "kernel") and kernel_ready(x, *tensors):
        return "kernel"
    choice = choose(
        "sync_batch_norm",
        implementation,
        reasons + kernel_reasons(probe, *tensors),
        torch_reasons=() if x.is_cuda else _NO_TORCH,
        inputs=describe(x, *tensors),
    )
    if choice == "reference":
        got = f"{describe(x, *tensors)}: {'; '.join(reasons) or 'the reference was asked for'}"
        raise ArgumentError("sync_batch_norm", "arguments", "such as the kernel takes", got)
    return choice


def sync_batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """batch_norm in training, as if the batches of the group's processes were one.

    The processes exchange count, mean and squares of every channel, and in the backward two sums;
    each merges them in the order of the ranks, so that all hold the same bits.
    """
    y, mean, var, count = _SyncBatchNorm.apply(x, weight, bias, eps, group)
    if running_mean is not None and running_var is not None:
        unbiased = var * (count / (count - 1))
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            running.copy_((1.0 - momentum) * running.double() + momentum * batch)
    return y


def _gather(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The `values` of all processes, [world, n], in the order of their ranks."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, eps: float, group: Any) -> Any:
        channels = x.shape[1]
        local = x.new_zeros(2 * channels + 1, dtype=torch.float64)
        if x.numel():
            local[:-1] = op.MOMENTS(x).flatten()
            local[-1] = x.numel() // channels
        parts = _gather(local, group)
        means, squares, counts = parts[:, :channels], parts[:, channels:-1], parts[:, -1:]
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        var = (squares + counts * (means - mean).square()).sum(0) / count
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        ctx.set_materialize_grads(False)
        if not x.numel():
            ctx.save_for_backward(x, weight, bias, None, count)
            return torch.empty_like(x), mean, var, count
        y, stats, _, _ = op.FORWARD(x, None, weight, bias, mean, var, False, 0.0, eps, 0, 0.0)
        ctx.save_for_backward(x, weight, bias, stats, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, *_: Any) -> Any:
        x, weight, bias, stats, count = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        if dy is None or stats is None:
            sums = x.new_zeros((2, x.shape[1]), dtype=torch.float64)
        else:
            sums = op.SUMS(dy, x, stats)
        dx = dweight = dbias = None
        if need_dx:
            means = _gather(sums, ctx.group).sum(0) / count
            if stats is None:
                dx = torch.empty_like(x)
            else:
                dy = torch.zeros_like(x) if dy is None else dy
                dx = op.DX(dy, x, weight, stats, means)
        if need_dweight:
            scaled = sums[1] if stats is None else sums[1] * stats[2]
            dweight = scaled.to(weight.dtype)
        if need_dbias:
            dbias = sums[0].to(bias.dtype)
        return dx, dweight, dbias, None, None
