"""scaled_dot_product_attention: self-attention of language and vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from .shapes import padding_mask, products, terms


def inputs(shape: Shape) -> Mapping[str, Input]:
    found = {name: Input(shape.size) for name in ("q", "k", "v")}
    if "padded" in shape.tags:
        batch, _, length, _ = shape.size
        size = (batch, 1, 1, length)
        found["mask"] = Input(size, grad=False, value=lambda: padding_mask(batch, length))
    return found


def run(
    q: Tensor, k: Tensor, v: Tensor, implementation: str, mask: Tensor | None = None,
    is_causal: bool = False,
) -> Any:  # fmt: skip
    return functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, implementation=implementation
    )


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Any:
    return torch_functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)


def causal(name: str, size: tuple[int, ...], *tags: str, quick: bool = False) -> Shape:
    return Shape(name, size, options={"is_causal": True}, tags=("causal", *tags), quick=quick)


def full(name: str, size: tuple[int, ...], *tags: str, quick: bool = False) -> Shape:
    return Shape(name, size, tags=("full", *tags), quick=quick)


# Awkward lengths and widths, and a round one near each.
_LENGTHS = {1: 8, 17: 16, 197: 192, 777: 768}
_WIDTHS = {20: 16, 40: 32, 80: 64, 96: 128, 160: 128, 256: 128}


def _of_length(length: int) -> tuple[int, ...]:
    """About as many tokens for each length."""
    return (max(2048 // length, 1), 8, length, 64)


def _pairs() -> tuple[Shape, ...]:
    pairs = [(_of_length(odd), _of_length(even)) for odd, even in _LENGTHS.items()]
    pairs += [((1, 8, 1024, odd), (1, 8, 1024, even)) for odd, even in _WIDTHS.items()]
    rounds = {size: Shape("round", size, group="odd") for _, size in pairs}
    return (
        *rounds.values(),
        *(Shape("odd", size, group="odd", twin=rounds[twin].id) for size, twin in pairs),
    )


BENCHMARK = Benchmark(
    op="scaled_dot_product_attention",
    family="attention",
    shapes=(
        causal("gpt2", (1, 12, 2048, 64), "T>=2048"),
        causal("llama", (1, 8, 2048, 128), "T>=2048"),
        causal("llama-8k", (1, 2, 8192, 128), "T>=2048"),
        full("gpt2-full", (1, 12, 2048, 64), "T>=2048"),
        full("llama-full", (1, 8, 2048, 128), "T>=2048"),
        full("gpt2-full-8k", (1, 2, 8192, 64), "T>=2048"),
        causal("gpt2-short", (2, 12, 512, 64), "T512", quick=True),
        causal("llama-short", (2, 8, 512, 128), "T512"),
        full("bert-base", (2, 12, 512, 64), "T512", quick=True),
        full("llama-short-full", (2, 8, 512, 128), "T512"),
        full("bert-base-short", (8, 12, 128, 64)),
        Shape("bert-base-padded", (4, 12, 512, 64), tags=("bert", "padded")),
        Shape("bert-base-padded", (8, 12, 128, 64), tags=("bert", "padded"), quick=True),
        full("vit-base", (8, 12, 197, 64), "vit"),
        full("vit-large", (4, 16, 197, 64), "vit"),
        full("swin-window", (128, 3, 49, 32)),
        *_pairs(),
        Shape("tiny", (1, 2, 8, 8), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager, compiled=False),),
    cost=products,
    reduction=terms,
    odd_loss=1.2,
)
