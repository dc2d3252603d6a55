"""What the Triton kernels across channels share: tiles, strides, ahead-of-time entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from udlkernels._aot import Entry
from udlkernels.normalization._channels import is_channels_last, positions_of, view_channels


@dataclass(frozen=True)
class Tile:
    """Channels and positions of one program; the dimension that is contiguous is the long one."""

    channels: int
    positions: int
    num_warps: int = 4


# 8 elements a thread along the contiguous dimension, for 128-bit loads of 16-bit types. Sizes
# follow from compiled code, not from timings on a GPU.
PLANES = Tile(4, 256)
LAST = Tile(256, 4)


@dataclass(frozen=True)
class Walk:
    """A tensor [B, C, ...] by its strides, and the tile to walk it with."""

    data: torch.Tensor
    last: bool
    batch: int
    channels: int
    positions: int
    strides: tuple[int, int, int]

    @property
    def tile(self) -> Tile:
        return LAST if self.last else PLANES


def walk(x: torch.Tensor, channels_last: bool | None = None) -> Walk:
    """x, or a copy of it where its layout has no such form."""
    if channels_last is None:
        channels_last = is_channels_last(x)
    positions = positions_of(x)
    data, *strides = view_channels(x, channels_last)
    last = channels_last or positions == 1
    return Walk(data, last, x.shape[0], x.shape[1], positions, (strides[0], strides[1], strides[2]))


def acc(x: torch.Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def acc_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def blocks(length: int, most: int) -> int:
    """The power of two that covers `length`, at most `most`."""
    return min(triton.next_power_of_2(length), most)


def entry(
    name: str,
    fn: Any,
    dtype: str,
    constexprs: Mapping[str, Any],
    *,
    wide: tuple[str, ...] = (),
    aligned: tuple[str, ...] = (),
    num_warps: int = 4,
) -> Entry:
    """An entry whose pointers are of `dtype`, or float32 where named in `wide`; all are aligned."""
    signature = {}
    for arg in fn.arg_names:
        if arg.endswith("_ptr"):
            signature[arg] = "*fp32" if arg in wide else f"*{dtype}"
        elif not arg.isupper():
            signature[arg] = "i32"
    constants = {key: value for key, value in constexprs.items() if key in fn.arg_names}
    pointers = tuple(arg for arg in fn.arg_names if arg.endswith("_ptr"))
    return Entry(f"{name} {dtype}", fn, signature, constants, pointers + aligned, num_warps)
