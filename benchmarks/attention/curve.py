"""How attention grows with the length: our op beside PyTorch's fused path and its plain one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from udlkernels import functional

from ..curve import Curve
from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import products, terms

_PLAIN_UP_TO = 4096  # beyond, the scores of PyTorch's plain path take gigabytes
_ROWS = 512  # queries whose scores the float64 formula holds at a time


def inputs(shape: Shape) -> Mapping[str, Input]:
    return {name: Input(shape.size) for name in ("q", "k", "v")}


def run(q: Tensor, k: Tensor, v: Tensor, implementation: str, is_causal: bool) -> Any:
    if implementation == "reference":
        return in_blocks(q, k, v)
    causal = "top_left" if is_causal else None
    return functional.attention(q, k, v, causal=causal, implementation=implementation)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, rows: int = _ROWS) -> Tensor:
    """The formula with a causal mask, in memory linear in the length."""
    ends = [min(start + rows, q.shape[2]) for start in range(0, q.shape[2], rows)]
    blocks = [
        checkpoint(_last, part, k[:, :, :end], v[:, :, :end], use_reentrant=False)
        for part, end in zip(q.split(rows, 2), ends, strict=True)
    ]
    return torch.cat(blocks, 2)


def _last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the queries that end where the keys do."""
    return functional.attention(  # type: ignore[no-any-return]
        q, k, v, causal="bottom_right", implementation="reference"
    )


def fused(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return torch_functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def plain(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """The path that PyTorch takes where the fused one does not serve: all scores in memory."""
    mask = _mask(q.shape[2], q.device) if is_causal else None
    with sdpa_kernel(SDPBackend.MATH):
        return torch_functional.scaled_dot_product_attention(q, k, v, mask)


@functools.lru_cache(maxsize=1)
def _mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def declared(length: int) -> Benchmark:
    peers = [Peer("eager", fused, compiled=False)]
    if length <= _PLAIN_UP_TO:
        peers.append(Peer("math", plain, compiled=False))
    return Benchmark(
        op="attention",
        family="attention",
        shapes=(Shape("curve", (1, 2, length, 64), options={"is_causal": True}),),
        inputs=inputs,
        run=run,
        peers=tuple(peers),
        cost=products,
        reduction=terms,
    )


CURVE = Curve(
    name="attention",
    lengths=(1024, 2048, 4096, 8192, 16384, 32768),
    declared=declared,
    time_exponent=2.05,
    memory_exponent=1.05,
)
