"""How a call chooses its implementation, and how the choice is explained.

`kernel_ready` is the fast question, asked on every call; `kernel_reasons` is the same question with
the answer in words, asked only when the fast one said no, or by `explain`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from udlkernels import _library
from udlkernels._errors import ArgumentError

IMPLEMENTATIONS = ("auto", "kernel", "torch", "reference")
KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_ready = _library.ready
_functorch_active = torch._C._are_functorch_transforms_active


@dataclass
class Choice:
    """One op's choice within an explained call."""

    op: str
    implementation: str
    not_taken: dict[str, list[str]] = field(default_factory=dict)
    inputs: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.op}: {self.implementation}" + (f"  ({self.inputs})" if self.inputs else "")
        ]
        for name, reasons in self.not_taken.items():
            lines += [f"  not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


recorder: list[Choice] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collects every choice made inside."""
    global recorder
    outer, recorder = recorder, []
    try:
        yield recorder
    finally:
        recorder = outer


def kernel_ready(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether our kernels can take these tensors, as far as every op asks the same."""
    if not (
        type(x) in _PLAIN
        and x.dtype in KERNEL_DTYPES
        and recorder is None
        and not _functorch_active()
        and forward_ad._current_level < 0
        and x.numel() != 0
    ):
        return False
    if x.is_cpu:
        if not _ready.cpu:
            return False
        for other in others:
            if other is not None and not (
                other.is_cpu and type(other) in _PLAIN and other.dtype in KERNEL_DTYPES
            ):
                return False
        return True
    return (
        x.is_cuda
        and _ready.cuda
        and all(
            other is None
            or (type(other) in _PLAIN and other.dtype in KERNEL_DTYPES and other.device == x.device)
            for other in others
        )
    )


def kernel_reasons(x: torch.Tensor, *others: torch.Tensor | None) -> list[str]:
    """Every reason why our kernels cannot take these tensors; empty where they can."""
    tensors = [x, *(other for other in others if other is not None)]
    reasons = []
    for tensor in tensors:
        kind = type(tensor)
        if kind not in _PLAIN and not kind.__module__.startswith("torch._subclasses"):
            reasons.append(f"tensor subclass {kind.__name__} has its own rules")
        if tensor.dtype not in KERNEL_DTYPES:
            reasons.append(f"element type {tensor.dtype} is not one of the kernels'")
        if tensor.device != x.device:
            reasons.append(f"tensors on {x.device} and {tensor.device}")
    if x.is_cpu and not _ready.cpu:
        reasons.append(_library.extension_error)
    elif x.is_cuda and not _ready.cuda:
        reasons.append("triton is not installed, or runs as interpreter")
    elif not (x.is_cpu or x.is_cuda):
        reasons.append(f"no kernels for device type {x.device.type}")
    if x.numel() == 0:
        reasons.append("the input has no elements")
    if _functorch_active():
        reasons.append("inside a functorch transform (vmap, grad, jvp)")
    if forward_ad._current_level >= 0:
        reasons.append("inside forward-mode differentiation")
    return reasons


def choose(
    op: str,
    implementation: str,
    reasons: Sequence[str],
    fallback: str = "torch",
    *,
    prefer: str = "kernel",
    prefer_reason: str = "",
    torch_reasons: Sequence[str] = (),
    inputs: str = "",
) -> str:
    """The implementation that serves a call, as the slow path decides it.

    Args:
        implementation: what the caller asked for.
        reasons: why the kernel cannot serve; empty where it can.
        fallback: what `auto` takes then: "torch" where PyTorch has the op, else "reference".
        prefer: what `auto` takes when the kernel can serve: the launch table's answer.
        prefer_reason: the table's reason when that is not the kernel.
        torch_reasons: why PyTorch's op cannot serve.

    Raises:
        ArgumentError: an unknown name, or one that cannot serve this call, with the reasons.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ArgumentError(op, "implementation", f"one of {IMPLEMENTATIONS}", repr(implementation))
    not_taken: dict[str, list[str]] = {}
    if reasons:
        not_taken["kernel"] = list(reasons)
    if torch_reasons:
        not_taken["torch"] = list(torch_reasons)
    if implementation == "auto":
        chosen = prefer if not reasons else fallback
        if chosen in not_taken:
            chosen = "reference"
        if chosen != "kernel" and not reasons:
            not_taken["kernel"] = [prefer_reason]
    else:
        chosen = implementation
        if chosen in not_taken:
            raise ArgumentError(
                op,
                "implementation",
                f"one that can serve this call (hint: implementation='auto' takes {fallback!r})",
                f"{chosen!r}, which cannot: {'; '.join(not_taken[chosen])}",
            )
        for other in IMPLEMENTATIONS[1:]:
            if other != chosen:
                not_taken.setdefault(other, [f"implementation={implementation!r} was asked for"])
    if recorder is not None:
        recorder.append(Choice(op, chosen, not_taken, inputs))
    return chosen


def describe(*tensors: torch.Tensor | None) -> str:
    """Shapes, element types and layouts, for error messages and `explain`."""
    words = []
    for tensor in tensors:
        if tensor is None:
            words.append("None")
            continue
        layout = "" if tensor.is_contiguous() else f" strides {tuple(tensor.stride())}"
        words.append(f"{str(tensor.dtype)[6:]}{list(tensor.shape)}{layout} {tensor.device.type}")
    return ", ".join(words)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to hear of a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def differentiate(
    formula: Callable[..., Any],
    tensors: Sequence[torch.Tensor | None],
    wanted: Sequence[bool],
    gradients: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again (`create_graph`), through a plain formula.

    The tensors enter through views, so that one which was computed from another counts once.
    """
    with torch.enable_grad():
        views = [None if t is None else t.view_as(t) for t in tensors]
        outputs = formula(*views)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        inputs = [v for v, want in zip(views, wanted, strict=True) if want and v is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    results = iter(found)
    return [
        next(results) if want and v is not None else None
        for v, want in zip(views, wanted, strict=True)
    ]
