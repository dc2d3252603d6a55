"""The correctness gate: no speed is reported for a result that is not right."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

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
    got = _poisoned(ours)
    verdict = Verdict(_chosen(ours))
    peer = row.benchmark.peers[0]
    expected = Contestant(
        peer.name, peer.run, copied(row, arguments), row.shape.options, row.dtype
    ).results()
    exact = _exact(row, arguments)
    for name, truth in exact.items():
        _compare(
            name, got[name], expected[name], truth, verdict, row.benchmark.reduction(row.shape)
        )
    if verdict.implementation == "torch":
        verdict.flags.append("torch")
    return verdict


def mostly_zero(got: Tensor, truth: Tensor) -> bool:
    """Zeros where the right answer has few."""
    few = (1 - _MOSTLY_ZERO) * got.numel()
    return bool(got.count_nonzero() < few <= truth.count_nonzero())


def _poisoned(contestant: Contestant) -> dict[str, Tensor]:
    """Its results, where what a kernel forgets to write is not zero by luck."""
    testing.poison_allocations()
    try:
        return contestant.results()
    finally:
        testing.poison_allocations(False)


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
    name: str, got: Tensor, peer: Tensor, truth: Tensor, verdict: Verdict, reduction: int
) -> None:
    """Applies the tests' own policy: at most twice the peer's error and two roundings."""
    ours, theirs = testing.error(got, truth), testing.error(peer, truth)
    allowed = testing.bound([theirs], got.dtype, reduction)
    verdict.errors[name] = {
        "ours": asdict(ours),
        "peer": asdict(theirs),
        "allowed": asdict(allowed),
    }
    if not (ours.largest <= allowed.largest and ours.rms <= allowed.rms):
        verdict.flags.append("wrong")
        verdict.notes.append(f"{name}: error {ours}, allowed {allowed}")
    if mostly_zero(got, truth):
        verdict.flags.append("zeros")
