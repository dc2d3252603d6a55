"""What attention has to move and to compute, and the padding of its batches."""

from __future__ import annotations

import functools
import zlib

import torch

from ..declaration import Cost, Shape


def terms(shape: Shape) -> int:
    """Of the sums over the width and over the keys or queries behind one number."""
    return shape.size[-2] + 2 * shape.size[-1]


def products(shape: Shape, dtype: torch.dtype) -> Cost:
    """Two products forward, five backward, over the scores that a mask leaves."""
    batch, heads, length, width = shape.size
    size = shape.numel * dtype.itemsize
    seen = (length + 1) / (2 * length) if shape.options.get("is_causal") else 1.0
    if "padded" in shape.tags:
        seen = sum(lengths(batch, length)) / (batch * length)
    product = int(2 * batch * heads * length * length * width * seen)
    return Cost(4 * size, 8 * size, 2 * product, 5 * product)


@functools.cache
def lengths(batch: int, longest: int) -> tuple[int, ...]:
    """Sentences of a batch: the first fills it, the others have a quarter of it or more."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{batch}x{longest}".encode()))
    drawn = torch.randint(max(longest // 4, 1), longest + 1, (batch,), generator=generator)
    return (longest, *drawn.tolist()[1:])


def padding_mask(batch: int, longest: int) -> torch.Tensor:
    """[B, 1, 1, S], True where a sentence has a token, as sentence models pass it."""
    sizes = torch.tensor(lengths(batch, longest))
    return (torch.arange(longest) < sizes[:, None])[:, None, None]
