"""Calls of multi_head_attention_forward by the names of their tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from udlkernels import functional as U
from udlkernels import testing

# N, L, S, E, H
SMALL = (2, 5, 7, 16, 4)
LARGE = (3, 33, 70, 48, 3)
TENSORS = (
    "query", "key", "value", "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias",
    "key_padding_mask", "attn_mask", "bias_k", "bias_v", "static_k", "static_v", "q_proj_weight",
    "k_proj_weight", "v_proj_weight",
)  # fmt: skip
OPS = ("attention_fwd", "attention_bwd")


def make_tensors(sizes, dtype=torch.float32, device="cpu", **extra):
    n, length, keys, e, _ = sizes
    shapes = dict(
        query=(length, n, e), key=(keys, n, e), value=(keys, n, e), in_proj_weight=(3 * e, e),
        in_proj_bias=(3 * e,), out_proj_weight=(e, e), out_proj_bias=(e,),
    )  # fmt: skip
    found = {
        name: testing.make(shape, dtype, device=device, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    for name in ("in_proj_weight", "out_proj_weight"):
        found[name] = found[name] * e**-0.5
    return found | extra


def call_with(function, tensors, heads, dropout_p=0.0, add_zero_attn=False, **options):
    """The function of its arguments by name."""
    given = dict(tensors)
    width = given["query"].shape[-1]
    first = [given.pop(name) for name in TENSORS[:3]]
    projections = [given.pop(n, None) for n in ("in_proj_weight", "in_proj_bias")]
    biases = [given.pop(n, None) for n in ("bias_k", "bias_v")]
    out = [given.pop(n, None) for n in ("out_proj_weight", "out_proj_bias")]
    if given.get("q_proj_weight") is not None:
        options["use_separate_proj_weight"] = True
    args = (*first, width, heads, *projections, *biases, add_zero_attn, dropout_p, *out)
    return function(*args, **given, **options)


def by_tensors(function, names, heads, **options):
    """The function of the tensors in the order of `names`, all of which may have gradients."""

    def call(*tensors):
        return call_with(function, dict(zip(names, tensors, strict=True)), heads, **options)

    return call


def kernel(*args, **options):
    return U.multi_head_attention_forward(*args, **options, implementation="kernel")


def formula(*args, **options):
    return U.multi_head_attention_forward(*args, **options, implementation="reference")


def terms(sizes):
    """Of the products between a gradient and what it is made of, forward and back."""
    n, length, keys, e, h = sizes
    return 4 * e + 3 * e // h + 2 * (length + keys) + n * max(length, keys)


def compare(tensors, sizes, ours=kernel, gradients=True, **options):
    """Ours against PyTorch's function in float64, values and all gradients."""
    h = sizes[-1]
    names = [name for name in TENSORS if tensors.get(name) is not None]
    theirs = by_tensors(F.multi_head_attention_forward, names, h, **options)
    return testing.compare(
        by_tensors(ours, names, h, **options),
        theirs,
        [theirs],
        [tensors[name] for name in names],
        gradients=gradients,
        reduction=terms(sizes),
    )


def sizes_for(backend):
    return [SMALL] if backend.small else [SMALL, LARGE]


def make_padding(sizes, kind, dtype=torch.float32, device="cpu"):
    """The last keys of every other sample hidden, or a float added."""
    n, _, keys, *_ = sizes
    if kind == "float":
        return testing.make((n, keys), dtype, device=device, seed=20)
    hidden = torch.arange(keys) >= keys - 3
    hidden = hidden & (torch.arange(n) % 2 == 0)[:, None]
    if kind == "infinite":
        return torch.zeros(n, keys, dtype=dtype).masked_fill(hidden, -math.inf).to(device)
    return hidden.to(device)


def make_mask(sizes, kind, dtype=torch.float32, device="cpu"):
    """A mask of [L, S] or [N H, L, S]; every query sees the first key."""
    n, length, keys, _, h = sizes
    shape = (n * h, length, keys) if kind.endswith("3") else (length, keys)
    x = testing.make(shape, dtype, device=device, seed=21)
    if kind.startswith("float"):
        return x
    hidden = x > 0.3
    hidden[..., 0] = False
    return hidden


def widened(tensors):
    """The same in float64."""
    return {name: x.double() for name, x in tensors.items()}
