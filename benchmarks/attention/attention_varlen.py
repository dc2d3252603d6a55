"""attention_varlen: batches of sequences of unequal length, beside the same batch padded."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Cost, Input, Peer, Shape

# Lengths of the sequences, by name: the packed length of a shape is their sum.
_LENGTHS = {
    "spread": (40, 4000, 80, 160, 400, 40, 800, 100),  # 1 to 100
    "prompts": (512, 37, 288, 1020, 64, 150, 711, 90, 33, 412, 120, 259),
    "sentences": tuple(8 + 11 * i % 57 for i in range(128)),
    "equal": (512,) * 8,
    "long": (3000, 50, 60, 70),
    "images": (196, 576, 49, 1024, 256, 784),
    "tiny": (3, 5),
}


def _total(name: str) -> int:
    return sum(_LENGTHS[name])


@functools.cache
def _ends(name: str) -> Tensor:
    return torch.tensor((0, *_LENGTHS[name])).cumsum(0)


@functools.cache
def _places(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every packed row the sample and the place in it, and which padded keys are real."""
    lengths = torch.tensor(_LENGTHS[name])
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    samples, rows = real.nonzero(as_tuple=True)
    return samples.to(device), rows.to(device), real[:, None, None].to(device)


def inputs(shape: Shape) -> Mapping[str, Input]:
    found = {name: Input(shape.size) for name in ("q", "k", "v")}
    lengths = shape.options["lengths"]
    ends = Input((len(_LENGTHS[lengths]) + 1,), grad=False, value=lambda: _ends(lengths))
    return found | {"cu_seqlens": ends}


def run(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, implementation: str, lengths: str,
    causal: str | None = None,
) -> Any:  # fmt: skip
    return functional.attention_varlen(
        q, k, v, cu_seqlens, cu_seqlens, causal=causal, implementation=implementation
    )


def eager(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: str, causal: str | None = None
) -> Any:
    samples, rows, real = _places(lengths, q.device)
    padded = []
    for x in (q, k, v):
        wide = x.new_zeros(real.shape[0], real.shape[-1], *x.shape[1:])
        padded.append(wide.index_put((samples, rows), x).transpose(1, 2))
    # What a causal query sees lies before the padding.
    out = torch_functional.scaled_dot_product_attention(
        *padded, attn_mask=None if causal else real, is_causal=causal is not None
    )
    return out.transpose(1, 2)[samples, rows]


def dense(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: str, causal: str | None = None
) -> Any:
    """Our attention on as many rows as the longest sequence has, of one sample."""
    longest = (x[None, : max(_LENGTHS[lengths])] for x in (q, k, v))
    return functional.attention(*longest, causal=causal, layout="bthd")


def _cost(shape: Shape, dtype: torch.dtype, lengths: tuple[int, ...]) -> Cost:
    """Two products forward, five backward, over the scores within each sequence."""
    _, heads, width = shape.size
    causal = shape.options.get("causal") is not None
    scores = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    product, moved = 2 * heads * width * scores, sum(lengths) * heads * width * dtype.itemsize
    return Cost(4 * moved, 8 * moved, 2 * product, 5 * product)


def cost(shape: Shape, dtype: torch.dtype) -> Cost:
    return _cost(shape, dtype, _LENGTHS[shape.options["lengths"]])


def dense_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    return _cost(shape, dtype, (max(_LENGTHS[shape.options["lengths"]]),))


def _shape(lengths: str, heads: int, width: int, causal: bool = True, **rest: Any) -> Shape:
    options = {"lengths": lengths} | ({"causal": "top_left"} if causal else {})
    size, name = (_total(lengths), heads, width), rest.pop("name", lengths)
    return Shape(name, size, options=options, tags=(lengths,), **rest)


BENCHMARK = Benchmark(
    op="attention_varlen",
    family="attention",
    shapes=(
        _shape("spread", 12, 64),
        _shape("spread", 12, 64, causal=False, name="spread-encoder"),
        _shape("prompts", 8, 128),
        _shape("sentences", 12, 64, causal=False, quick=True),
        _shape("equal", 12, 64),
        _shape("long", 12, 64),
        _shape("images", 12, 64, causal=False),
        _shape("tiny", 2, 8, group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(
        Peer("eager", eager, compiled=False),
        Peer("dense (ours)", dense, compiled=False, cost=dense_cost),
    ),
    cost=cost,
    reduction=lambda shape: max(_LENGTHS[shape.options["lengths"]]) + 2 * shape.size[-1],
)
