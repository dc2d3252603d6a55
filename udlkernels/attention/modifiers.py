"""Changes of attention's scores as functions, with the signatures of PyTorch's flex_attention.

    score_mod(score, b, h, q_idx, kv_idx) -> score
    mask_mod(b, h, q_idx, kv_idx) -> bool

What is made here says what it does, so that `udlkernels.functional.attention` runs it on its own
kernels; any other function of these signatures is taken too, and computed otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from udlkernels._errors import ArgumentError

__all__ = [
    "alibi",
    "causal",
    "document",
    "key_padding",
    "prefix_lm",
    "softcap",
    "window",
]


class MaskModifier:
    """A mask_mod; `a & b` sees what both see, `a | b` what either sees, `~a` the rest."""

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        raise NotImplementedError

    def __and__(self, other: Callable[..., Any]) -> MaskModifier:
        return Every((*parts(self), *parts(other)))

    def __rand__(self, other: Callable[..., Any]) -> MaskModifier:
        return Every((*parts(other), *parts(self)))

    def __or__(self, other: Callable[..., Any]) -> MaskModifier:
        return Computed(lambda *at: self(*at) | other(*at))

    def __ror__(self, other: Callable[..., Any]) -> MaskModifier:
        return self | other

    def __invert__(self) -> MaskModifier:
        return Computed(lambda *at: ~self(*at))


class ScoreModifier:
    """A score_mod; `a.then(b)` applies a first."""

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        raise NotImplementedError

    def then(self, other: Callable[..., Any]) -> ScoreModifier:
        return Chain((*parts(self), *parts(other)))


def parts(modifier: Any) -> tuple[Callable[..., Any], ...]:
    """The functions that a combination consists of, in their order."""
    return modifier.parts if isinstance(modifier, (Every, Chain)) else (modifier,)


@dataclass(eq=False)
class Every(MaskModifier):
    parts: tuple[Callable[..., Any], ...]

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        seen = self.parts[0](b, h, q_idx, kv_idx)
        for part in self.parts[1:]:
            seen = seen & part(b, h, q_idx, kv_idx)
        return seen


@dataclass(eq=False)
class Computed(MaskModifier):
    """A mask known only by its values."""

    function: Callable[..., Any]

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.function(b, h, q_idx, kv_idx)


@dataclass(eq=False)
class Chain(ScoreModifier):
    parts: tuple[Callable[..., Any], ...]

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for part in self.parts:
            score = part(score, b, h, q_idx, kv_idx)
        return score


@dataclass(eq=False)
class Window(MaskModifier):
    left: int | None
    right: int | None
    offset: int

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = kv_idx - q_idx - self.offset
        if self.left is None:
            return distance <= self.right
        return distance >= -self.left if self.right is None else self._inside(distance)

    def _inside(self, distance: Any) -> Any:
        return (distance >= -self.left) & (distance <= self.right)  # type: ignore[operator]


@dataclass(eq=False)
class PrefixLM(MaskModifier):
    length: int | torch.Tensor

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        length = self.length[b] if isinstance(self.length, torch.Tensor) else self.length
        return (kv_idx <= q_idx) | (kv_idx < length)


@dataclass(eq=False)
class Document(MaskModifier):
    """`ranges`: [B or 1, T, 2], where each document lies; None where they do not lie in a piece."""

    ids: torch.Tensor
    ranges: torch.Tensor | None

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if self.ids.dim() == 1:
            return self.ids[q_idx] == self.ids[kv_idx]
        return self.ids[b, q_idx] == self.ids[b, kv_idx]


@dataclass(eq=False)
class KeyPadding(MaskModifier):
    lengths: torch.Tensor

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < self.lengths[b]


@dataclass(eq=False)
class Alibi(ScoreModifier):
    slopes: torch.Tensor
    offset: int

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        slope = self.slopes[h] if self.slopes.dim() == 1 else self.slopes[b, h]
        return score - slope.to(score.dtype) * abs(kv_idx - q_idx - self.offset)


@dataclass(eq=False)
class Softcap(ScoreModifier):
    cap: float

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.cap * torch.tanh(score / self.cap)


def causal(offset: int = 0) -> MaskModifier:
    """Query i sees the keys up to i + offset; S - T is FlashAttention's alignment."""
    return Window(None, 0, _integer("causal", "offset", offset))


def window(left: int | None, right: int | None, offset: int = 0) -> MaskModifier:
    """Query i sees `left` keys before key i + offset, that one, and `right` behind it.

    None on one side is no limit there.
    """
    if left is None and right is None:
        raise ArgumentError("window", "left", "a limit on one side at least", None)
    for name, side in (("left", left), ("right", right)):
        if side is not None and _integer("window", name, side) < 0:
            raise ArgumentError("window", name, "an integer >= 0 or None (no limit)", side)
    return Window(left, right, _integer("window", "offset", offset))


def prefix_lm(prefix_length: int | torch.Tensor) -> MaskModifier:
    """Queries see the prefix, and the keys up to their own place.

    Args:
        prefix_length: an integer, or a tensor of integers [B].
    """
    if isinstance(prefix_length, torch.Tensor):
        _check_integers("prefix_lm", "prefix_length", prefix_length, (1,))
        return PrefixLM(prefix_length)
    return PrefixLM(_integer("prefix_lm", "prefix_length", prefix_length))


def document(ids: torch.Tensor) -> MaskModifier:
    """Tokens see the tokens of the same document: of several that are packed in a row.

    The ids are looked at here, once: where each document lies in a piece, as packing leaves them,
    attention's memory stays linear in the length. Under torch.compile, where a document is made in
    compiled code, and for ids that come back later, a mask of [B, T, T] bytes is made instead.

    Args:
        ids: integers [B, T], or [T] for all samples; the same number for the same document.
    """
    _check_integers("document", "ids", ids, (1, 2))
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return Document(ids, None)
    rows = ids if ids.dim() == 2 else ids[None]
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    ordered = rows.sort(1).values
    pieces, documents = starts.sum(1), (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
    if not torch.equal(pieces, documents):
        return Document(ids, None)
    number = starts.cumsum(1)  # of a token's piece: sorted
    ends = (torch.searchsorted(number, number, right=right) for right in (False, True))
    return Document(ids, torch.stack(tuple(ends), -1))


def key_padding(lengths: torch.Tensor) -> MaskModifier:
    """Keys from a sample's length on are not seen.

    Args:
        lengths: integers [B].
    """
    _check_integers("key_padding", "lengths", lengths, (1,))
    return KeyPadding(lengths)


def alibi(slopes: torch.Tensor, offset: int = 0) -> ScoreModifier:
    """score - slope * |j - i - offset|.

    Args:
        slopes: floating point [H] or [B, H].
    """
    if not (isinstance(slopes, torch.Tensor) and slopes.is_floating_point() and slopes.dim() < 3):
        raise ArgumentError("alibi", "slopes", "a floating point tensor [H] or [B, H]", slopes)
    return Alibi(slopes, _integer("alibi", "offset", offset))


def softcap(cap: float) -> ScoreModifier:
    """cap * tanh(score / cap)."""
    if not 0.0 < cap < float("inf"):
        raise ArgumentError("softcap", "cap", "a finite number > 0", cap)
    return Softcap(float(cap))


def _integer(op: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ArgumentError(op, name, "an integer", repr(value))
    return value  # type: ignore[return-value]


def _check_integers(op: str, name: str, tensor: Any, dims: tuple[int, ...]) -> None:
    if not (
        isinstance(tensor, torch.Tensor)
        and not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        and tensor.dim() in dims
    ):
        shapes = " or ".join(
            "[B]" if n == 1 and 2 not in dims else ["[T]", "[B, T]"][n - 1] for n in dims
        )
        raise ArgumentError(op, name, f"a tensor of integers {shapes}", type(tensor).__name__)
