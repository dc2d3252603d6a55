"""apply_rotary: queries and keys of language models with rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from udlkernels import functional

from ..declaration import Benchmark, Input, Peer, Shape
from ..normalization.shapes import passes

# How much of a head turns, where it is not all of it.
_WIDTHS = {"phi-2": 32, "gpt-neox-20b": 24, "gpt-j-6b": 64}
_BTHD = {"layout": "bthd"}


def inputs(shape: Shape) -> Mapping[str, Input]:
    positions = shape.size[1 if shape.options.get("layout") == "bthd" else 2]
    table = (positions, _WIDTHS.get(shape.name, shape.size[3]) // 2)
    return {"x": Input(shape.size)} | {name: Input(table, grad=False) for name in ("cos", "sin")}


def run(x: Tensor, cos: Tensor, sin: Tensor, implementation: str, **options: Any) -> Any:
    return functional.apply_rotary(x, cos, sin, **options, implementation=implementation)


def eager(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, layout: str = "bhtd"
) -> Any:
    """As in Hugging Face's models: tables of full width, and the half that is turned beside x."""
    if layout == "bthd":
        cos, sin = cos[:, None], sin[:, None]
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        across = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        across = torch.cat((-turned[..., half:], turned[..., :half]), -1)
    y = turned * cos + across * sin
    return torch.cat((y, rest), -1) if rest.shape[-1] else y


BENCHMARK = Benchmark(
    op="apply_rotary",
    family="attention",
    shapes=(
        Shape("llama3-8b", (1, 32, 2048, 128), quick=True),
        Shape("llama3-8b-keys", (1, 8, 2048, 128)),
        Shape("qwen2-7b", (1, 2048, 28, 128), options=_BTHD, quick=True),
        Shape("gemma2-9b", (1, 16, 2048, 256)),
        Shape("phi-2", (2, 32, 1024, 80)),
        Shape("gpt-neox-20b", (1, 64, 1024, 96)),
        Shape("gpt-j-6b", (1, 16, 2048, 256), options={"interleaved": True}, quick=True),
        Shape("roformer-base", (8, 12, 512, 64), options={"interleaved": True}),
        Shape("llama3-8b-token", (16, 32, 1, 128)),
        Shape("tiny", (1, 2, 8, 8), group="overhead", quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager),),
    cost=passes(forward=2, backward=2),
    fused=True,
)
