"""The calls that are timed: one contestant's forward, and its forward and backward."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .declaration import Input, Row, Shape

Arguments = dict[str, Tensor]
_KINDS = {"normal": (0.0, 1.0), "scale": (1.0, 0.1), "small": (0.0, 0.1)}


def draw(row: Row, device: torch.device) -> Arguments:
    """The inputs of a row: the same on every run, of no other row."""
    generator = torch.Generator().manual_seed(zlib.crc32(row.id.encode()))
    return {
        name: _tensor(spec, row.shape, row.dtype, device, generator)
        for name, spec in row.benchmark.inputs(row.shape).items()
    }


def copied(row: Row, arguments: Arguments) -> Arguments:
    """The same inputs, with a copy of each that the op writes."""
    specs = row.benchmark.inputs(row.shape)
    return {
        name: value.clone() if specs[name].written else value for name, value in arguments.items()
    }


def flat(outputs: Any) -> list[Tensor]:
    """The tensors that an op returned."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


class Contestant:
    """A function with its arguments bound, ready to be called in a loop."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: Arguments,
        options: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.arguments = arguments
        self.leaves = [value for value in arguments.values() if value.requires_grad]
        self.call = functools.partial(function, **arguments, **options)
        self._grads: list[Tensor] = []

    def backward(self, outputs: Any) -> Sequence[Tensor]:
        """Gradients of all leaves; those of the outputs are drawn at the first call.

        They are rounded to the row's dtype, so that the float64 reference gets the same values.
        """
        differentiable = [value for value in flat(outputs) if value.requires_grad]
        if not self._grads:
            self._grads = [
                torch.empty_like(value).copy_(_random(value.shape, value.device, i).to(self.dtype))
                for i, value in enumerate(differentiable)
            ]
        return torch.autograd.grad(differentiable, self.leaves, self._grads)

    def results(self) -> dict[str, Tensor]:
        """Outputs, gradients and written inputs of one call, by name."""
        outputs = self.call()
        found = {f"output {i}": value.detach() for i, value in enumerate(flat(outputs))}
        if self.leaves:
            names = [name for name, value in self.arguments.items() if value.requires_grad]
            grads = self.backward(outputs)
            found |= {f"grad {name}": grad for name, grad in zip(names, grads, strict=True)}
        return found | {
            name: value.clone()
            for name, value in self.arguments.items()
            if value.is_floating_point() and not value.requires_grad
        }


class Copy:
    """The ceiling as a contestant: as many bytes, copied into memory allocated for the call.

    Sampled in the same rounds, it meets the same caches and the same heap as the ops do.
    """

    name = "copy"

    def __init__(self, row: Row, device: torch.device) -> None:
        cost = row.benchmark.cost(row.shape, row.dtype)
        halves = [cost.bytes(phase) // 2 // 4 for phase in ("forward", "backward")]  # float32
        read, other = (torch.ones(size, device=device) for size in halves)
        self.call = read.clone
        self.backward = lambda outputs: other.clone()


class Read(Copy):
    """As many bytes, only read, for ops that write little beside what they read."""

    name = "read"

    def __init__(self, row: Row, device: torch.device) -> None:
        cost = row.benchmark.cost(row.shape, row.dtype)
        read, other = (
            torch.ones(cost.bytes(phase) // 4, device=device) for phase in ("forward", "backward")
        )
        self.call = read.sum
        self.backward = lambda outputs: other.sum()


def _tensor(
    spec: Input, shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    if spec.value is not None:
        return spec.value().to(device)
    mean, deviation = _KINDS[spec.kind]
    value = torch.empty(spec.size).normal_(mean, deviation, generator=generator)
    value = value.to(device, spec.dtype or dtype)
    if shape.layout == "channels_last" and value.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        value = value.contiguous(memory_format=formats[value.dim()])
    return value.requires_grad_(spec.grad)


@functools.lru_cache(maxsize=4)
def _random(shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    """Kept for the row's other contestants, which get the same values."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)
