"""What attention has to move and to compute."""

from __future__ import annotations

import torch

from ..declaration import Cost, Shape


def terms(shape: Shape) -> int:
    """Of the sums over the width and over the keys or queries behind one number."""
    return shape.size[-2] + 2 * shape.size[-1]


def products(shape: Shape, dtype: torch.dtype) -> Cost:
    """Two products forward, five backward, over the scores that a causal mask leaves."""
    batch, heads, length, width = shape.size
    size = shape.numel * dtype.itemsize
    seen = (length + 1) / (2 * length) if shape.options.get("is_causal") else 1.0
    product = int(2 * batch * heads * length * length * width * seen)
    return Cost(4 * size, 8 * size, 2 * product, 5 * product)
