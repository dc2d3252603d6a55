"""The tolerance policy and the inputs that tests and benchmarks share.

A kernel is right when its error against the formula in float64 is at most twice that of its peer
in the same type plus two machine epsilons, measured in the largest and in the root mean square
deviation, for the output and for every gradient:

    error(kernel) <= 2 * error(peer) + 2 * eps(dtype)

The peer is PyTorch's op, or the formula run in that type where PyTorch has no op; of several peers
(memory layouts, say) the worst counts. For a float64 kernel the oracle is no wider than the kernel,
and its own rounding, taken as 8 eps, is added.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from udlkernels import _library

LAYOUTS = ("contiguous", "sliced", "offset", "transposed", "channels_last", "expanded")
VALUES = ("normal", "shifted", "large", "denormal", "constant", "zeros", "nonfinite")
_ORACLE_ROUNDING = 8 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Error:
    """Largest and root mean square deviation, each relative to the oracle's own."""

    largest: float
    rms: float

    def __str__(self) -> str:
        return f"max {self.largest:.2e} rms {self.rms:.2e}"


def error(actual: torch.Tensor, oracle: torch.Tensor) -> Error:
    """The deviation of `actual` from `oracle`; infinite where NaN or Inf stand elsewhere."""
    if actual.shape != oracle.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    ours, exact = actual.detach().double().cpu(), oracle.detach().double().cpu()
    finite = exact.isfinite()
    # What overflows the type that `actual` has is right as an infinity of the same sign.
    limit = torch.finfo(actual.dtype).max if actual.is_floating_point() else math.inf
    exact = torch.where(finite & (exact.abs() > limit), exact.sign() * math.inf, exact)
    finite = exact.isfinite()
    if not bool(finite.all()):
        if not torch.equal(ours[~finite].nan_to_num(nan=7.0), exact[~finite].nan_to_num(nan=7.0)):
            return Error(math.inf, math.inf)
        ours, exact = ours[finite], exact[finite]
    if ours.numel() == 0:
        return Error(0.0, 0.0)
    if not bool(ours.isfinite().all()):
        return Error(math.inf, math.inf)
    deviation = (ours - exact).abs()
    scale, rms_scale = exact.abs().max().item(), exact.square().mean().sqrt().item()
    largest, rms = deviation.max().item(), deviation.square().mean().sqrt().item()
    return Error(largest / (scale or 1.0), rms / (rms_scale or 1.0))


def bound(peers: Sequence[Error], dtype: torch.dtype, reduction: int = 0) -> Error:
    """The error that the policy allows; `reduction` is a product's reduction length, else 0."""
    eps = torch.finfo(dtype).eps
    own = _ORACLE_ROUNDING if dtype == torch.float64 else 0.0
    floor = math.sqrt(reduction) * eps
    usable = [peer for peer in peers if math.isfinite(peer.largest)]
    largest = max((peer.largest for peer in usable), default=0.0)
    rms = max((peer.rms for peer in usable), default=0.0)
    return Error(max(2 * largest + 2 * eps + own, floor), max(2 * rms + 2 * eps + own, floor))


def check(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    peers: Sequence[torch.Tensor],
    what: str = "output",
    reduction: int = 0,
) -> None:
    """Raises AssertionError where `actual` breaks the policy."""
    ours = error(actual, oracle)
    theirs = [error(peer, oracle) for peer in peers]
    allowed = bound(theirs, actual.dtype, reduction)
    if not (ours.largest <= allowed.largest and ours.rms <= allowed.rms):
        peer_text = "; ".join(str(peer) for peer in theirs) or "none"
        raise AssertionError(f"{what}: error {ours}, allowed {allowed} (peers: {peer_text})")


@dataclass
class Results:
    """What a function gave: its outputs, and the gradients to its inputs where it has any."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]


def run(
    fn: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor] | None = None,
    gradients: bool = True,
) -> Results:
    """Calls `fn(*inputs)` and differentiates the result along `cotangents` (random when None)."""
    leaves = [
        t.detach().requires_grad_(gradients) if t is not None and t.is_floating_point() else t
        for t in inputs
    ]
    result = fn(*leaves)
    outputs = list(result) if isinstance(result, tuple) else [result]
    outputs = [output for output in outputs if output is not None]
    if not gradients:
        return Results(outputs, [None] * len(leaves))
    if cotangents is None:
        cotangents = make_cotangents(outputs)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    differentiable = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in differentiable],
            wanted,
            [c.to(o.dtype) for o, c in differentiable],
            allow_unused=True,
        )
    )
    grads = [next(found) if t is not None and t.requires_grad else None for t in leaves]
    return Results([o.detach() for o in outputs], grads)


def make_cotangents(outputs: Sequence[torch.Tensor], seed: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)
        for o in outputs
    ]


def compare(
    kernel: Callable[..., Any],
    oracle: Callable[..., Any],
    peers: Sequence[Callable[..., Any]],
    inputs: Sequence[torch.Tensor | None],
    *,
    gradients: bool = True,
    reduction: int = 0,
) -> Results:
    """Checks a kernel's outputs and every gradient against the policy; returns what it gave.

    Args:
        kernel, oracle, peers: functions of the same inputs; the oracle gets them in float64. With
            no peer that can take the inputs, the oracle run in their own type is the peer.
        inputs: tensors or None; gradients are taken to all floating point ones.
    """
    ours = run(kernel, inputs, gradients=gradients)
    cotangents = make_cotangents(ours.outputs)
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
    exact = run(oracle, wide, [c.double() for c in cotangents], gradients)
    theirs = []
    for peer in peers:
        with contextlib.suppress(RuntimeError, NotImplementedError):
            theirs.append(run(peer, inputs, cotangents, gradients))
    if not theirs:
        theirs = [run(oracle, inputs, cotangents, gradients)]
    for i, (output, wanted) in enumerate(zip(ours.outputs, exact.outputs, strict=True)):
        check(output, wanted, [t.outputs[i] for t in theirs], f"output {i}", reduction)
    for i, (gradient, wanted_gradient) in enumerate(
        zip(ours.gradients, exact.gradients, strict=True)
    ):
        if wanted_gradient is None:
            if gradient is not None and bool(gradient.any()):
                raise AssertionError(f"gradient {i}: expected none")
            continue
        if gradient is None:
            raise AssertionError(f"gradient {i}: missing")
        others = [g for g in (t.gradients[i] for t in theirs) if g is not None]
        check(gradient, wanted_gradient, others, f"gradient {i}", reduction)
    return ours


def make(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    values: str = "normal",
    layout: str = "contiguous",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> torch.Tensor:
    """A tensor of one of `VALUES` in one of `LAYOUTS`.

    "sliced" and "offset" lie in a larger buffer of NaN, so that a read beyond the tensor's own
    elements shows; "shifted" has mean 100 and deviation 0.01.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if values == "shifted":
        x = 100 + 0.01 * x
    elif values == "large":
        x = x * (1e4 if dtype == torch.float16 else 1e18)
    elif values == "denormal":
        x = x * torch.finfo(dtype).tiny * 0.1
    elif values == "constant":
        x = torch.full_like(x, 3.0)
    elif values == "zeros":
        x = torch.zeros_like(x)
    elif values == "nonfinite" and x.numel() > 2:
        flat = x.flatten()
        flat[0], flat[x.numel() // 2] = math.nan, math.inf
    return lay_out(x.to(device, dtype), layout)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout ("expanded" repeats the first of dimension 0)."""
    if layout == "contiguous" or x.ndim == 0:
        return x.contiguous()
    if layout == "expanded":
        return x[:1].contiguous().expand_as(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last":
        if x.ndim < 3:
            return x.contiguous()
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "offset":
        buffer = x.new_full((x.numel() + 66,), math.nan)
        view = buffer[33 : 33 + x.numel()].view(x.shape)
    else:
        buffer = x.new_full([size + 5 for size in x.shape], math.nan)
        view = buffer[tuple(slice(2, 2 + size) for size in x.shape)]
    return view.copy_(x)


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Inside, the C++ kernels use the instruction set `name`."""
    before = _library.isa_active()
    _library.set_isa(name)
    try:
        yield
    finally:
        _library.set_isa(before or name)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poison_allocations(active: bool = True) -> bool:
    """Makes fresh memory hold large values instead of zeros, where the C library can do so.

    What a kernel forgets to write then shows as a wrong result. Returns whether it took effect.
    """
    import ctypes

    m_perturb = -6
    try:
        return bool(ctypes.CDLL(None).mallopt(m_perturb, int(active)))
    except (AttributeError, OSError):
        return False
