"""The activations that fused normalizations apply: their names and formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from udlkernels._errors import ArgumentError

# An activation's place here is its number in the ops' schemas and in csrc/activation.h.
ACTIVATIONS = ("identity", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu")
_INDEX = {name: index for index, name in enumerate(ACTIVATIONS)}


def activation_index(op: str, name: str) -> int:
    """The number of an activation; ArgumentError where `name` is none."""
    index = _INDEX.get(name)
    if index is None:
        raise ArgumentError(op, "activation", f"one of {ACTIVATIONS}", repr(name))
    return index


def activate(x: torch.Tensor, activation: str, negative_slope: float = 0.01) -> torch.Tensor:
    """The activation in plain torch."""
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    return x
