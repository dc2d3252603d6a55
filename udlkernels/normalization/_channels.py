"""Layouts of [B, C, ...] tensors, as csrc/normalization/channels_op.h sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether results for this input have their channels innermost in memory."""
    sizes, strides = x.shape[2:], x.stride()[2:]
    return x.stride(1) == 1 and not _merge(sizes, strides, 1) and _merge(sizes, strides, None)


def empty_channels(x: torch.Tensor, channels_last: bool | None = None) -> torch.Tensor:
    """A dense tensor shaped and typed as x, channels innermost where x has them so."""
    if not (is_channels_last(x) if channels_last is None else channels_last):
        return x.new_empty(x.shape)
    strides = [1] * x.dim()
    stride = x.shape[1]
    for d in range(x.dim() - 1, 1, -1):
        strides[d] = stride
        stride = stride * x.shape[d]
    strides[0] = stride
    return x.new_empty_strided(x.shape, strides)


def view_channels(x: torch.Tensor, channels_last: bool) -> tuple[torch.Tensor, int, int, int]:
    """x, or a dense copy where its positions are no single dimension, and its strides (batch,
    channel, position)."""
    if not _merge(x.shape[2:], x.stride()[2:], None if channels_last else 1):
        x = empty_channels(x, channels_last).copy_(x)
    positions = [s for n, s in zip(x.shape[2:], x.stride()[2:], strict=True) if n != 1]
    return x, x.stride(0), x.stride(1), positions[-1] if positions else 1


def positions_of(x: torch.Tensor) -> int:
    """How many positions lie behind each channel."""
    count = 1
    for size in x.shape[2:]:
        count *= size
    return count


def per_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[C] shaped to broadcast over [B, C, ...]."""
    return values.reshape(1, -1, *(1,) * (like.dim() - 2))


def _merge(sizes: Sequence[int], strides: Sequence[int], step: int | None) -> bool:
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        if stride != step:
            return False
        step = step * size
    return True
