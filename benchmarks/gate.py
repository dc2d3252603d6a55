"""The correctness gate: no speed is reported for a result that is not right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from udlkernels import _dispatch, testing

from .contestant import Arguments, Contestant, copied
from .declaration import Row

_MOSTLY_ZERO = 2 / 3


@dataclass
class Verdict:
    """Flags of a result ("wrong", "zeros", "torch"), the reason in words, and its errors."""

    implementation: str
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, Any] = field(default_factory=dict)


def check(row: Row, arguments: Arguments, implementation: str = "auto") -> Verdict:
    """Ours on fresh inputs and before anyone else has computed the answer."""
    options = {**row.shape.options, "implementation": implementation}
    ours = Contestant("ours", row.benchmark.run, copied(row, arguments), options, row.dtype)
    with testing.poisoned_memory():
        got = ours.results()
    verdict = Verdict(_chosen(ours))
    peer = row.benchmark.peers[0]
    expected = Contestant(
        peer.name, peer.run, copied(row, arguments), row.shape.options, row.dtype
    ).results()
    exact = _exact(row, arguments)
    for name, truth in exact.items():
        _compare(name, got[name], expected[name], truth, row, verdict)
    if verdict.implementation == "torch":
        verdict.flags.append("torch")
    return verdict


def mostly_zero(got: Tensor, truth: Tensor) -> bool:
    """Zeros where the right answer has few."""
    zeros = (got == 0).double().mean().item() if got.numel() else 0.0
    return zeros > _MOSTLY_ZERO and (truth == 0).double().mean().item() <= _MOSTLY_ZERO


def _chosen(contestant: Contestant) -> str:
    with _dispatch.recording() as choices:
        contestant.call()
    return choices[0].implementation if choices else "none"


def _exact(row: Row, arguments: Arguments) -> dict[str, Tensor]:
    """The reference formula in float64 on the same values."""
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if value.is_floating_point()
        else value
        for name, value in copied(row, arguments).items()
    }
    options = {**row.shape.options, "implementation": "reference"}
    return Contestant("reference", row.benchmark.run, wide, options, row.dtype).results()


def _compare(
    name: str, got: Tensor, peer: Tensor, truth: Tensor, row: Row, verdict: Verdict
) -> None:
    """Applies the tests' own policy: at most twice the peer's error and two roundings."""
    ours, theirs = testing.errors(got, truth), testing.errors(peer, truth)
    eps = torch.finfo(row.dtype).eps
    verdict.errors[name] = {"ours": ours, "peer": theirs}
    for kind, error, other in zip(("max", "rms"), ours, theirs, strict=True):
        if not error <= 2 * other + 2 * eps:
            verdict.flags.append("wrong")
            verdict.notes.append(f"{name}: {kind} error {error:.1e}, peer {other:.1e}")
    if mostly_zero(got, truth):
        verdict.flags.append("zeros")
