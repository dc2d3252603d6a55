"""Masks of blocks by name: those of the book's figure 12.15, and of sparse transformers.

A pattern says which blocks of queries see which blocks of keys. `a | b` sees what either sees,
`a & b` what both see, `~a` the rest; `repr` draws it.

    pattern = patterns.dilated(64, 5, 3) & patterns.causal(64) | patterns.global_tokens(64, 1)
    functional.block_sparse_attention(q, k, v, pattern.mask, block_size=64)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from udlkernels._errors import ArgumentError

__all__ = [
    "Pattern",
    "causal",
    "convolutional",
    "dilated",
    "full",
    "global_tokens",
    "local",
    "random",
    "selected_tokens",
    "strided",
]


@dataclass(frozen=True, eq=False, repr=False)
class Pattern:
    """Which blocks see which: `mask`, bool [query blocks, key blocks]."""

    mask: torch.Tensor

    @property
    def density(self) -> float:
        """The share of the blocks that are seen."""
        return self.mask.double().mean().item() if self.mask.numel() else 0.0

    def __or__(self, other: Pattern) -> Pattern:
        return Pattern(self.mask | self._beside(other))

    def __and__(self, other: Pattern) -> Pattern:
        return Pattern(self.mask & self._beside(other))

    def __invert__(self) -> Pattern:
        return Pattern(~self.mask)

    def _beside(self, other: Pattern) -> torch.Tensor:
        if other.mask.shape != self.mask.shape:
            wanted = f"{list(self.mask.shape)} blocks, as on the other side"
            raise ArgumentError("patterns", "pattern", wanted, list(other.mask.shape))
        return other.mask

    def __repr__(self) -> str:
        rows = ["".join("#" if seen else "." for seen in row) for row in self.mask.tolist()]
        sizes = " x ".join(str(n) for n in self.mask.shape)
        return "\n".join([f"{sizes} blocks, {self.density:.0%} seen", *rows])


def full(n_query_blocks: int, n_key_blocks: int | None = None) -> Pattern:
    """Figure 12.15a: every block sees every block."""
    return _where(n_query_blocks, n_key_blocks, lambda i, j: (i >= 0) & (j >= 0))


def causal(n_query_blocks: int, n_key_blocks: int | None = None) -> Pattern:
    """Figure 12.15b: a block sees itself and those before it.

    The last of them whole: `causal` of the function hides what follows inside of a block.
    """
    return _where(n_query_blocks, n_key_blocks, lambda i, j: j <= i)


def convolutional(n_query_blocks: int, width: int, n_key_blocks: int | None = None) -> Pattern:
    """Figure 12.15c: a block sees the `width` blocks around it, an odd number; & causal, 12.15d."""
    return dilated(n_query_blocks, width, 1, n_key_blocks)


def dilated(
    n_query_blocks: int, width: int, dilation: int, n_key_blocks: int | None = None
) -> Pattern:
    """Figure 12.15e and f (& causal): `width` blocks, `dilation` apart, around a block's own."""
    _at_least("width", width, 1)
    _at_least("dilation", dilation, 1)
    if width % 2 == 0:
        raise ArgumentError("patterns", "width", "an odd number", width)
    reach = dilation * (width // 2)
    return _where(
        n_query_blocks,
        n_key_blocks,
        lambda i, j: ((j - i) % dilation == 0) & ((j - i).abs() <= reach),
    )


def selected_tokens(
    n_query_blocks: int, blocks: Sequence[int], n_key_blocks: int | None = None
) -> Pattern:
    """Figure 12.15g (& causal, 12.15h): the blocks named see all, and all see them."""
    for block in blocks:
        _at_least("blocks", block, 0)
    chosen = torch.tensor(list(blocks), dtype=torch.int64)
    return _where(
        n_query_blocks,
        n_key_blocks,
        lambda i, j: torch.isin(i, chosen) | torch.isin(j, chosen),
    )


def global_tokens(n_query_blocks: int, count: int, n_key_blocks: int | None = None) -> Pattern:
    """Figure 12.15i: the first `count` blocks hold tokens that were added; they see all, and all
    see them."""
    _at_least("count", count, 0)
    return _where(n_query_blocks, n_key_blocks, lambda i, j: (i < count) | (j < count))


def local(n_query_blocks: int, before: int, after: int, n_key_blocks: int | None = None) -> Pattern:
    """A block sees `before` blocks before itself and `after` behind."""
    _at_least("before", before, 0)
    _at_least("after", after, 0)
    return _where(n_query_blocks, n_key_blocks, lambda i, j: (j >= i - before) & (j <= i + after))


def strided(n_query_blocks: int, stride: int, n_key_blocks: int | None = None) -> Pattern:
    """Child et al., 2019: the last `stride` blocks, and every stride-th one before them; causal."""
    _at_least("stride", stride, 1)
    return _where(
        n_query_blocks,
        n_key_blocks,
        lambda i, j: (j <= i) & ((i - j < stride) | ((i - j) % stride == 0)),
    )


def random(
    n_query_blocks: int, per_row: int, seed: int, n_key_blocks: int | None = None
) -> Pattern:
    """Zaheer et al., 2020: a block sees `per_row` blocks drawn for it; the seed decides which."""
    keys = _sizes(n_query_blocks, n_key_blocks)[1]
    _at_least("per_row", per_row, 0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n_query_blocks, keys, generator=generator).argsort(1)
    return Pattern(order.argsort(1) < per_row)


def _where(
    queries: int, keys: int | None, seen: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Pattern:
    queries, keys = _sizes(queries, keys)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    return Pattern(seen(i, j).expand(queries, keys).contiguous())


def _sizes(queries: int, keys: int | None) -> tuple[int, int]:
    _at_least("n_query_blocks", queries, 0)
    if keys is not None:
        _at_least("n_key_blocks", keys, 0)
    return queries, queries if keys is None else keys


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError("patterns", name, f"an integer >= {least}", repr(value))
