"""multi_head_attention_forward: self- and cross-attention with their projections, and padding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from udlkernels import functional

from ..declaration import Benchmark, Cost, Input, Peer, Shape

_FOUR = {"num_heads": 4}
_BERT = {"num_heads": 12, "padded": True}
_GPT = {"num_heads": 12, "is_causal": True}


def inputs(shape: Shape) -> Mapping[str, Input]:
    _, batch, width = shape.size
    found = {"query": Input(shape.size)}
    if "keys" in shape.options:
        found["memory"] = Input((shape.options["keys"], batch, width))
    sizes = {
        "in_proj_weight": (3 * width, width),
        "in_proj_bias": (3 * width,),
        "out_proj_weight": (width, width),
        "out_proj_bias": (width,),
    }
    return found | {name: Input(size, "small") for name, size in sizes.items()}


def run(implementation: str, **arguments: Any) -> Any:
    function = functools.partial(
        functional.multi_head_attention_forward, implementation=implementation
    )
    return _call(function, **arguments)


def eager(**arguments: Any) -> Any:
    return _call(torch_functional.multi_head_attention_forward, **arguments)


def _call(
    function: Callable[..., Any],
    query: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    num_heads: int,
    memory: Tensor | None = None,
    keys: int = 0,
    padded: bool = False,
    is_causal: bool = False,
) -> Any:
    key = query if memory is None else memory
    padding = _padding(key.shape[1], key.shape[0], key.device) if padded else None
    mask = _causal(len(query), query.device) if is_causal else None
    out, _ = function(
        query, key, key, query.shape[2], num_heads, in_proj_weight, in_proj_bias, None, None,
        False, 0.0, out_proj_weight, out_proj_bias, key_padding_mask=padding, need_weights=False,
        attn_mask=mask, is_causal=is_causal,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=4)
def _padding(batch: int, keys: int, device: torch.device) -> Tensor:
    """The first sample is whole, and the last is half padding."""
    lengths = keys - keys * torch.arange(batch, device=device) // (2 * max(batch - 1, 1))
    return torch.arange(keys, device=device) >= lengths[:, None]


@functools.lru_cache(maxsize=4)
def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def products(shape: Shape, dtype: torch.dtype) -> Cost:
    """The four projections, and attention's products over the scores that a causal mask leaves."""
    length, batch, width = shape.size
    keys = shape.options.get("keys", length)
    seen = (length + 1) / (2 * length) if shape.options.get("is_causal") else 1.0
    projections = 2 * batch * (2 * length + 2 * keys) * width**2
    scores = int(2 * batch * length * keys * width * seen)
    rows = batch * (length + (keys if "keys" in shape.options else 0))
    weights = 4 * width**2 + 4 * width
    forward = (rows + batch * length) * width + weights
    backward = (2 * rows + batch * length) * width + 2 * weights
    size = dtype.itemsize
    return Cost(
        forward * size, backward * size, projections + 2 * scores, 2 * projections + 5 * scores
    )


def terms(shape: Shape) -> int:
    """Of the products between a gradient and what it is made of, forward and back."""
    length, batch, width = shape.size
    keys = shape.options.get("keys", length)
    return 4 * width + 3 * width // shape.options["num_heads"] + (2 + batch) * (length + keys)


BENCHMARK = Benchmark(
    op="multi_head_attention_forward",
    family="attention",
    shapes=(
        Shape("bert-base", (512, 2, 768), options=_BERT),
        Shape("bert-base-short", (128, 8, 768), options=_BERT, quick=True),
        Shape("gpt2", (1024, 1, 768), options=_GPT),
        Shape("vit-base", (197, 8, 768), options={"num_heads": 12}, quick=True),
        Shape(
            "translation-decoder", (64, 16, 512),
            options={"num_heads": 8, "keys": 80, "padded": True},
        ),
        Shape("detr-decoder", (100, 2, 256), options={"num_heads": 8, "keys": 850, "padded": True}),
        Shape("whisper-base-decoder", (224, 1, 512), options={"num_heads": 8, "keys": 1500}),
        Shape("tiny", (8, 1, 16), group="overhead", options=_FOUR, quick=True),
    ),
    inputs=inputs,
    run=run,
    peers=(Peer("eager", eager, compiled=False),),
    cost=products,
    reduction=terms,
)  # fmt: skip
