"""The usual tables of indices for relative_position_bias."""

from __future__ import annotations

import math

import torch

from udlkernels._errors import ArgumentError


def swin_index(
    window_h: int, window_w: int, *, device: torch.device | str | None = None
) -> torch.Tensor:
    """Swin's index of relative positions in a window, whose tokens are in the order of rows.

    Args:
        window_h, window_w: tokens along both sides.
        device: where the index lies.

    Returns:
        int64 [T, T] with T = window_h * window_w, for a table of
        (2 * window_h - 1) * (2 * window_w - 1) rows: (dy + window_h - 1) * (2 * window_w - 1) +
        dx + window_w - 1, where (dy, dx) is the query's place less the key's.

    Raises:
        ArgumentError: a side below 1.

    Source: section 12.10; Liu et al., 2021, "Swin Transformer".
    """
    for name, side in (("window_h", window_h), ("window_w", window_w)):
        if side < 1:
            raise ArgumentError("swin_index", name, "at least 1", side)
    token = torch.arange(window_h * window_w, device=device)
    y, x = token // window_w, token % window_w
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + window_h - 1) * (2 * window_w - 1) + dx + window_w - 1


def t5_index(
    T: int,
    S: int,
    *,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """T5's buckets of relative positions: one for each short distance, then wider and wider ones.

    Args:
        T: queries, at positions 0 to T - 1.
        S: keys, at positions 0 to S - 1.
        bidirectional: half of the buckets are for keys behind the query (the encoder); without it
            all such keys share the bucket of distance 0 (the decoder).
        num_buckets: the table's rows.
        max_distance: from here on all distances share the last bucket.
        device: where the index lies.

    Returns:
        int64 [T, S], each from 0 to num_buckets - 1.

    Raises:
        ArgumentError: T or S below 0, fewer buckets than the directions need (4, or 2), or a
            max_distance that leaves nothing to the wider buckets.

    Source: Raffel et al., 2020, "Exploring the Limits of Transfer Learning with T5".
    """
    for name, length in (("T", T), ("S", S)):
        if length < 0:
            raise ArgumentError("t5_index", name, "at least 0", length)
    directions = 2 if bidirectional else 1
    if num_buckets < 2 * directions:
        raise ArgumentError("t5_index", "num_buckets", f"at least {2 * directions}", num_buckets)
    buckets = num_buckets // directions
    exact = buckets // 2
    if max_distance <= exact:
        raise ArgumentError("t5_index", "max_distance", f"more than {exact}", max_distance)
    ahead = torch.arange(S, device=device) - torch.arange(T, device=device)[:, None]
    distance = ahead.abs() if bidirectional else (-ahead).clamp(min=0)
    # In float32, as the buckets of published weights were made.
    ratio = (distance.clamp(min=exact).float() / exact).log() / math.log(max_distance / exact)
    wider = exact + (ratio * (buckets - exact)).long()
    bucket = torch.where(distance < exact, distance, wider.clamp(max=buckets - 1))
    return bucket + buckets * (ahead > 0) if bidirectional else bucket
