"""What a benchmark file declares: an op, its shapes and inputs, its peers, its bytes and flops.

A declaration holds no measuring code. `python -m udlkernels.benchmarks` and `pytest benchmarks`
read the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PHASES = ("forward", "backward", "step")
GROUPS = ("model", "odd", "overhead")


@dataclass(frozen=True)
class Shape:
    """One size to measure, named after the model and layer it comes from.

    Args:
        name: such as "gpt2" or "resnet50-conv2"; no slash.
        size: size of the main input.
        group: "model"; "odd" for awkward sizes, compared with the `twin` of round size by time over
            what the ceilings allow; "overhead" for tiny inputs, measured as whole public calls on
            one thread.
        layout: memory format of the inputs with four or five dimensions.
        options: keyword arguments of the op and of its peers, such as num_groups.
        twin: id of the shape that an odd one is compared with.
        quick: whether the quick run measures it.
        tags: words by which a goal names it, beside its name.
    """

    name: str
    size: tuple[int, ...]
    group: str = "model"
    layout: str = "contiguous"
    options: Mapping[str, Any] = field(default_factory=dict)
    twin: str = ""
    quick: bool = False
    tags: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """All that a goal can name it by."""
        return (self.name, *self.tags)

    @property
    def id(self) -> str:
        parts = [self.name, "x".join(map(str, self.size))]
        if self.layout != "contiguous":
            parts.append(self.layout)
        return "-".join(parts)

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class Input:
    """One tensor argument, drawn anew for each row.

    `kind`: "normal", "scale" (around one) or "small" (around zero), both with deviation 0.1.
    `dtype` None is the row's; `grad`: a floating input whose gradient belongs to the step;
    `written`: the op updates it in place; `value` makes the tensor instead of a draw.
    """

    size: tuple[int, ...]
    kind: str = "normal"
    grad: bool = True
    dtype: torch.dtype | None = None
    written: bool = False
    value: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class Cost:
    """Bytes that have to cross memory once, and flops of the algorithm."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0

    def bytes(self, phase: str) -> int:
        return self._of(phase, self.forward_bytes, self.backward_bytes)

    def flops(self, phase: str) -> int:
        return self._of(phase, self.forward_flops, self.backward_flops)

    @staticmethod
    def _of(phase: str, forward: int, backward: int) -> int:
        return {"forward": forward, "backward": backward, "step": forward + backward}[phase]


@dataclass(frozen=True)
class Peer:
    """Another way to the outputs, someone else's or ours: a function of the same arguments.

    `compiled` asks for the same function through `torch.compile` as a further peer, of the first
    one only. `cost`: what this way has to move and compute, where that is not what the op has to,
    as with a dense op beside a sparse one.
    """

    name: str
    run: Callable[..., Any]
    compiled: bool = True
    cost: Callable[[Shape, torch.dtype], Cost] | None = None


@dataclass(frozen=True)
class Benchmark:
    """One op of the library beside its peers.

    `reduction`: how many products the longest sum behind a result has, for the bound on its error.
    `run` is the public function with the arguments of `inputs` and of `Shape.options` by name, and
    the keyword `implementation`. `fused`: the peer is a sequence of ops, above whose peak memory
    the op must not only not be, but stay below. `traffic`: "read" for an op that writes little,
    whose ceiling then is a plain read of as many bytes instead of a copy. `odd_loss`: how many
    times as long an awkward size may take as its round twin, each over what the ceilings allow.
    """

    op: str
    family: str
    shapes: tuple[Shape, ...]
    inputs: Callable[[Shape], Mapping[str, Input]]
    run: Callable[..., Any]
    peers: tuple[Peer, ...]
    cost: Callable[[Shape, torch.dtype], Cost]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    fused: bool = False
    reduction: Callable[[Shape], int] = lambda shape: 0
    traffic: str = "copy"
    odd_loss: float = 1.15


@dataclass(frozen=True)
class Row:
    """What one line of the table measures."""

    benchmark: Benchmark
    shape: Shape
    dtype: torch.dtype

    @property
    def id(self) -> str:
        return f"{self.benchmark.op}/{self.shape.id}/{DTYPE_NAMES[self.dtype]}"

    @property
    def phases(self) -> tuple[str, ...]:
        """Only the forward where no input has a gradient."""
        inputs = self.benchmark.inputs(self.shape).values()
        return PHASES if any(spec.grad and spec.value is None for spec in inputs) else PHASES[:1]


@dataclass(frozen=True)
class Case:
    """A goal: the geometric mean of the ratios to a peer over an op's model shapes.

    Args:
        op, phase, dtype: the rows it speaks of.
        goal: the peer's time over ours; None only shows the figure.
        share: the alternative, a share of the measured ceiling.
        layout: None takes all layouts.
        where: words that a shape must all have, as its name or tags; () takes all shapes.
        peer: whom the ratio is to.
        per_flop: compares flops per second, each over its own flops, instead of the times.
        memory: peak extra memory, at most this much of the peer's for each of the shapes.
    """

    op: str
    phase: str
    dtype: torch.dtype
    goal: float | None = None
    share: float | None = None
    layout: str | None = None
    where: tuple[str, ...] = ()
    peer: str = "eager"
    per_flop: bool = False
    memory: float | None = None

    @property
    def name(self) -> str:
        layout = {None: "", "contiguous": " NCHW", "channels_last": " channels-last"}[self.layout]
        name = f"{self.op} {self.phase} {DTYPE_NAMES[self.dtype]}{layout}"
        name = " ".join([name, *self.where])
        if self.peer == "eager":
            return name
        return f"{name} / {self.peer}" + (", per flop" if self.per_flop else "")

    def covers(self, op: str, phase: str, dtype: str, layout: str, words: Iterable[str]) -> bool:
        wanted = (self.op, self.phase, DTYPE_NAMES[self.dtype])
        named = set(self.where) <= set(words)
        return wanted == (op, phase, dtype) and self.layout in (None, layout) and named


@dataclass(frozen=True)
class OverheadCase:
    """A goal for tiny inputs: microseconds on top of eager PyTorch's whole call."""

    op: str
    phase: str
    extra_us: float
