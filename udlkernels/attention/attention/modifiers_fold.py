"""What the kernels' own options can say of a score_mod and a mask_mod."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from udlkernels._dispatch import describe
from udlkernels._errors import ArgumentError
from udlkernels.attention import modifiers
from udlkernels.attention.attention.reference import NO_LIMIT
from udlkernels.attention.modifiers import (
    Alibi,
    Document,
    KeyPadding,
    PrefixLM,
    Softcap,
    Window,
)

_OP = "attention"


@dataclass
class Folded:
    """A call's options with the modifiers among them, or the reasons why they cannot be."""

    mask: Any
    key_lengths: Any
    alibi_slopes: Any
    ranges: Any
    limits: tuple[int, int, int]
    softcap: float
    reasons: list[str] = field(default_factory=list)


def fold(
    q: torch.Tensor, k: torch.Tensor, score_mod: Any, mask_mod: Any, mask: Any, key_lengths: Any,
    alibi_slopes: Any, limits: tuple[int, int, int], softcap: float,
) -> Folded:  # fmt: skip
    """Everything that is said beside q [B, H, T, D] and k [B, Hkv, S, D]."""
    for name, mod in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if mod is not None and not callable(mod):
            raise ArgumentError(_OP, name, "a function", type(mod).__name__)
    folded = Folded(mask, key_lengths, alibi_slopes, None, limits, softcap)
    diagonal = None if alibi_slopes is None else limits[0]
    if score_mod is not None:
        diagonal = _fold_scores(folded, q, modifiers.parts(score_mod), diagonal)
    left, right = (None if side == NO_LIMIT else side for side in limits[1:])
    windows = [Window(left, right, limits[0])]
    for part in () if mask_mod is None else modifiers.parts(mask_mod):
        if isinstance(part, Window):
            windows.append(part)
        elif isinstance(part, KeyPadding):
            _fold_lengths(folded, q, part.lengths)
        elif isinstance(part, PrefixLM):
            _fold_prefix(folded, q, k, part.length)
        elif isinstance(part, Document):
            _fold_document(folded, q, k, part)
        else:
            folded.reasons.append("mask_mod is not one of udlkernels.attention.modifiers")
    if len(windows) > 1 or (diagonal is not None and diagonal != limits[0]):
        _fold_windows(folded, windows, diagonal)
    return folded


def _fold_scores(folded: Folded, q: torch.Tensor, found: Any, diagonal: int | None) -> int | None:
    """The kernels scale, bound, and subtract ALiBi, in this order; returns ALiBi's offset."""
    bounded = sloped = False
    for part in found:
        if isinstance(part, Softcap):
            if folded.softcap > 0.0 or sloped:
                folded.reasons.append("score_mod bounds a score twice, or after ALiBi")
            folded.softcap = part.cap
            bounded = True
        elif isinstance(part, Alibi):
            if folded.alibi_slopes is not None:
                folded.reasons.append("score_mod is not the only ALiBi")
            elif folded.softcap > 0.0 and not bounded:
                folded.reasons.append("softcap bounds what ALiBi has changed")
            shapes = (q.shape[1:2], q.shape[:2])
            _check(q, "score_mod", "slopes [H] or [B, H]", part.slopes, shapes)
            folded.alibi_slopes, diagonal, sloped = part.slopes, part.offset, True
        else:
            folded.reasons.append("score_mod is not one of udlkernels.attention.modifiers")
    return diagonal


def _fold_windows(folded: Folded, windows: list[Window], diagonal: int | None) -> None:
    """One window that is all of them, on ALiBi's diagonal where there is one."""
    lows = [w.offset - w.left for w in windows if w.left is not None]
    highs = [w.offset + w.right for w in windows if w.right is not None]
    if diagonal is None:
        diagonal = min(highs) if highs else max(lows)
    left = diagonal - max(lows) if lows else NO_LIMIT
    right = min(highs) - diagonal if highs else NO_LIMIT
    if left < 0 or right < 0:
        folded.reasons.append("mask_mod's windows leave out the diagonal, or everything")
    folded.limits = diagonal, left, right


def _fold_lengths(folded: Folded, q: torch.Tensor, lengths: torch.Tensor) -> None:
    _check(q, "mask_mod", "lengths [B]", lengths, (q.shape[:1],))
    given, lengths = folded.key_lengths, lengths.to(torch.int64)
    folded.key_lengths = lengths if given is None else torch.minimum(given.to(torch.int64), lengths)


def _fold_prefix(folded: Folded, q: torch.Tensor, k: torch.Tensor, length: Any) -> None:
    own = torch.arange(1, q.shape[2] + 1, device=q.device)
    if isinstance(length, torch.Tensor):
        _check(q, "mask_mod", "prefix lengths [B]", length, (q.shape[:1],))
        high = torch.maximum(own, length[:, None].to(torch.int64))
    else:
        high = own.clamp_min(length)[None]
    _narrow(folded, torch.stack((torch.zeros_like(high), high), -1))


def _fold_document(folded: Folded, q: torch.Tensor, k: torch.Tensor, part: Document) -> None:
    if q.shape[2] != k.shape[2]:
        got = f"{q.shape[2]} queries and {k.shape[2]} keys"
        raise ArgumentError(_OP, "mask_mod", "as many keys as queries, for documents", got)
    shapes = (q.shape[2:3], (q.shape[0], q.shape[2]))
    _check(q, "mask_mod", "document ids [T] or [B, T]", part.ids, shapes)
    if part.ranges is not None:
        _narrow(folded, part.ranges)
        return
    ids = part.ids if part.ids.dim() == 2 else part.ids[None]
    same = (ids[:, :, None] == ids[:, None, :])[:, None]
    folded.mask = same if folded.mask is None else folded.mask & same


def _narrow(folded: Folded, ranges: torch.Tensor) -> None:
    """The ranges [B or 1, T, 2], and what is in them of those before."""
    if folded.ranges is not None:
        low = torch.maximum(folded.ranges[..., 0], ranges[..., 0])
        ranges = torch.stack((low, torch.minimum(folded.ranges[..., 1], ranges[..., 1])), -1)
    folded.ranges = ranges


def _check(q: torch.Tensor, name: str, what: str, tensor: torch.Tensor, shapes: Any) -> None:
    if tensor.shape not in shapes or tensor.device != q.device:
        lists = " or ".join(str(list(shape)) for shape in dict.fromkeys(map(tuple, shapes)))
        raise ArgumentError(_OP, name, f"{what} = {lists} on {q.device}", describe(tensor))
