"""Text from a model, a token at a time: greedy, sampled (top-k, nucleus), or by beam search.

Section 12.7.2 of the book. A model has `config.context`, `cache(rows)`, an empty `Cache`, and
`model(tokens [B, T], cache)`, which appends T positions to the cache and returns the logits [B, V]
of the token after the last. T is 1 unless the cache is empty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from udlkernels._errors import ArgumentError


@dataclass
class Cache:
    """Keys and values of every layer, each [B, S, Hkv, D], of which `length` rows are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @classmethod
    def empty(
        cls, layers: int, rows: int, capacity: int, heads: int, width: int, like: Tensor
    ) -> Cache:
        shape = (rows, capacity, heads, width)
        keys, values = ([like.new_empty(shape) for _ in range(layers)] for _ in range(2))
        return cls(keys, values)

    def take(self, other: Cache, parents: Tensor) -> None:
        """Each row becomes the row of `other`, which may be this one, that `parents` names."""
        self.length = other.length
        pairs = zip(self.keys + self.values, other.keys + other.values, strict=True)
        for ours, theirs in pairs:
            ours[:, : self.length] = theirs[parents, : self.length]


def generate(
    model: Any,
    prompt: Sequence[int],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int | None = None,
    length_penalty: float = 0.0,
    stop: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Tokens that go on from the prompt, as they come; the model is in evaluation mode meanwhile.

    Args:
        prompt: tokens, at least one. Only what fits the context is read; where the text grows
            beyond it, its last half is read anew.
        tokens: how many to generate at most.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that reach this probability together only,
            after top_k (nucleus sampling).
        beams: search for likely sequences with this many candidates, without sampling. Tokens
            come when all candidates agree on them. Prompt and tokens must fit the context.
        length_penalty: candidates are judged by log probability / length ** length_penalty.
        stop: a token that ends the text, and is not returned.
        seed: of the generator that samples.

    Raises:
        ArgumentError: options that do not fit, before the first token.
    """
    _check(prompt, tokens, temperature, top_k, top_p, beams, length_penalty)
    if beams is None:
        found = _sample(model, prompt, tokens, temperature, top_k, top_p, seed)
        return _running(model, _until(stop, found))
    if len(prompt) + tokens > model.config.context:
        wanted = f"at most {model.config.context} tokens with the prompt, for beams"
        raise ArgumentError("generate", "tokens", wanted, len(prompt) + tokens)
    if temperature != 1.0 or top_k is not None or top_p is not None:
        raise ArgumentError("generate", "beams", "no options of sampling beside it", beams)
    return _running(model, _beam_search(model, prompt, tokens, beams, length_penalty, stop))


def _check(
    prompt: Sequence[int], tokens: int, temperature: float, top_k: int | None,
    top_p: float | None, beams: int | None, length_penalty: float,
) -> None:  # fmt: skip
    wrong = (
        ("prompt", "at least one token", len(prompt), len(prompt) < 1),
        ("tokens", "0 or more", tokens, tokens < 0),
        ("temperature", "0 or more, finite", temperature, not 0 <= temperature < math.inf),
        ("top_k", "1 or more", top_k, top_k is not None and top_k < 1),
        ("top_p", "a probability above 0", top_p, top_p is not None and not 0 < top_p <= 1),
        ("beams", "1 or more", beams, beams is not None and beams < 1),
        ("length_penalty", "0 or more", length_penalty, not 0 <= length_penalty < math.inf),
    )
    for name, expected, got, is_wrong in wrong:
        if is_wrong:
            raise ArgumentError("generate", name, expected, got)


def _running(model: nn.Module, found: Iterator[int]) -> Iterator[int]:
    training = model.training
    model.eval()
    try:
        yield from found
    finally:
        model.train(training)


def _until(stop: int | None, found: Iterator[int]) -> Iterator[int]:
    return itertools.takewhile(lambda token: token != stop, found)


def distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities [V] that a token is drawn by."""
    values, order = logits.float().sort(descending=True, stable=True)
    if temperature == 0.0:
        values, top_k = torch.zeros_like(values), 1
    else:
        values = values / temperature
    if top_k is not None:
        values[top_k:] = -math.inf
    p = values.softmax(-1)
    if top_p is not None:
        before = p.cumsum(-1) - p
        before[0] = 0.0  # the most likely token stays, whatever rounding says
        p = torch.where(before < top_p, p, 0.0)
        p = p / p.sum()
    return torch.zeros_like(p).scatter(0, order, p)


@torch.no_grad()
def _sample(
    model: Any, prompt: Sequence[int], tokens: int, temperature: float, top_k: int | None,
    top_p: float | None, seed: int,
) -> Iterator[int]:  # fmt: skip
    text, context = list(prompt), model.config.context
    cache = model.cache(1)
    device = cache.keys[0].device
    generator = torch.Generator(device).manual_seed(seed)
    unread = text[-context:]
    for _ in range(tokens):
        logits = model(torch.tensor([unread], device=device), cache)[0]
        p = distribution(logits, temperature, top_k, top_p)
        token = int(torch.multinomial(p, 1, generator=generator))
        yield token
        text.append(token)
        unread = [token]
        if cache.length == context:
            cache.length, unread = 0, text[-max(context // 2, 1) :]


@dataclass
class Candidate:
    score: float  # log probability
    tokens: list[int]


class Beams:
    """The candidates of a beam search: those that still grow, and the best that has ended."""

    def __init__(self, width: int, limit: int, length_penalty: float, stop: int | None) -> None:
        self.width, self.limit, self.length_penalty, self.stop = width, limit, length_penalty, stop
        self.growing = [Candidate(0.0, [])]
        self.ended: Candidate | None = None  # with its judged score

    def judged(self, candidate: Candidate, length: int) -> float:
        """The score by which candidates of different length are compared."""
        return candidate.score / max(length, 1) ** self.length_penalty

    def grow(self, log_p: Tensor) -> list[int]:
        """Every candidate by the best tokens of log_p [candidates, V]; returns their parents."""
        scores = log_p.new_tensor([candidate.score for candidate in self.growing])
        totals = log_p + scores[:, None]  # [candidates, V]
        best = totals.flatten().topk(min(2 * self.width, totals.numel()))
        grown: list[Candidate] = []
        parents: list[int] = []
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            parent, token = divmod(index, totals.shape[1])
            candidate = Candidate(score, [*self.growing[parent].tokens, token])
            if token == self.stop:
                self._end(candidate)
            elif len(grown) < self.width and score > -math.inf:
                grown.append(candidate)
                parents.append(parent)
        while grown and len(grown) < self.width:  # the cache has a row for each
            grown.append(Candidate(-math.inf, grown[-1].tokens))
            parents.append(parents[-1])
        self.growing = grown
        return parents

    def _end(self, candidate: Candidate) -> None:
        score = self.judged(candidate, len(candidate.tokens))
        if self.ended is None or score > self.ended.score:
            self.ended = Candidate(score, candidate.tokens[:-1])

    @property
    def done(self) -> bool:
        """Whether none that grows can still win: scores only fall, and lengths have a limit."""
        if not self.growing or self.ended is None:
            return not self.growing
        best = max(self.growing, key=lambda candidate: candidate.score)
        return self.ended.score >= self.judged(best, self.limit)

    def agreed(self) -> list[int]:
        """The tokens that all candidates begin with."""
        ended = [] if self.ended is None else [self.ended]
        tokens = [candidate.tokens for candidate in (*self.growing, *ended)]
        same = itertools.takewhile(lambda at: len(set(at)) == 1, zip(*tokens, strict=False))
        return [at[0] for at in same]

    def winner(self) -> list[int]:
        judged = [(self.judged(c, len(c.tokens)), c.tokens) for c in self.growing]
        if self.ended is not None:
            judged.append((self.ended.score, self.ended.tokens))
        return max(judged, key=lambda pair: pair[0], default=(0.0, []))[1]


@torch.no_grad()
def _beam_search(
    model: Any, prompt: Sequence[int], tokens: int, beams: int, length_penalty: float,
    stop: int | None,
) -> Iterator[int]:  # fmt: skip
    search = Beams(beams, tokens, length_penalty, stop)
    cache, wide = model.cache(1), model.cache(beams)
    device = cache.keys[0].device
    unread = [list(prompt)]
    given = 0
    for _ in range(tokens):
        logits = model(torch.tensor(unread, device=device), cache)
        parents = search.grow(logits.double().log_softmax(-1))
        if search.done:
            break
        wide.take(cache, torch.tensor(parents, device=device))
        cache = wide
        unread = [candidate.tokens[-1:] for candidate in search.growing]
        agreed = search.agreed()
        yield from agreed[given:]
        given = len(agreed)
    yield from search.winner()[given:]
