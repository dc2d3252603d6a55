"""Generation: what is drawn, what beams find, and that caches follow their candidates."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from udlkernels import ArgumentError
from udlkernels.models.generation import Beams, Cache, distribution, generate


class Historian(nn.Module):
    """Logits that depend on every token so far and its place, which only the cache remembers."""

    def __init__(self, vocabulary: int = 4, context: int = 12, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (context, vocabulary, vocabulary)
        self.table = nn.Parameter(torch.randn(shape, generator=generator))
        self.config = SimpleNamespace(context=context)
        self.calls: list[tuple[int, ...]] = []

    def cache(self, rows: int) -> Cache:
        return Cache.empty(2, rows, self.config.context, 1, 1, self.table)

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        assert not self.training
        self.calls.append(tuple(tokens.shape))
        rows, steps = tokens.shape
        assert steps == 1 or cache.length == 0
        end = cache.length + steps
        for layer in (*cache.keys, *cache.values):
            assert layer.shape[0] == rows
            layer[:, cache.length : end] = tokens[:, :, None, None].to(layer)
        cache.length = end
        histories = {tuple(map(tuple, layer[:, :end, 0, 0].tolist())) for layer in cache.values}
        (history,) = histories  # the layers' caches agree
        return torch.stack([self.logits([int(token) for token in row]) for row in history])

    def logits(self, history: list[int]) -> Tensor:
        return self.table[torch.arange(len(history)), history].sum(0).detach()  # [V]

    def score(self, prompt: list[int], tokens: list[int]) -> float:
        """The log probability of the tokens behind the prompt."""
        total = 0.0
        for i, token in enumerate(tokens):
            logits = self.logits([*prompt, *tokens[:i]]).double()
            total += float(logits.log_softmax(-1)[token])
        return total

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        text = list(prompt)
        for _ in range(tokens):
            text.append(int(self.logits(text).argmax()))
        return text[len(prompt) :]


LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 0.5}, [0.01, 0.25, 0.0225, 0.0625]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [0, 0.5, 0.15, 0.25]),
        ({"top_k": 9}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 0.5, 0, 0.25]),
        ({"top_p": 0.8}, [0, 0.5, 0.15, 0.25]),
        ({"top_p": 1.0}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        # Of the three that remain, the first two have 0.75 / 0.9 of the probability.
        ({"top_k": 3, "top_p": 0.8}, [0, 0.5, 0, 0.25]),
    ],
    ids=str,
)
def test_distribution(options: dict[str, Any], expected: list[float]) -> None:
    found = distribution(LOGITS, **options)
    wanted = torch.tensor(expected)
    torch.testing.assert_close(found, wanted / wanted.sum())
    assert torch.equal(found == 0, wanted == 0)


def test_equal_logits_keep_exactly_k() -> None:
    assert (distribution(torch.zeros(7), top_k=3) > 0).sum() == 3


def test_draws_come_from_the_distribution_and_nothing_else() -> None:
    model = Historian(vocabulary=6, seed=2)
    possible = distribution(model.logits([1]), top_p=0.9) > 0
    assert 1 < possible.sum() < 6
    drawn = {next(generate(model, [1], 1, top_p=0.9, seed=seed)) for seed in range(200)}
    assert drawn == {int(token) for token in possible.nonzero()}


def test_seed_decides() -> None:
    model = Historian()
    texts = {tuple(generate(model, [1], 10, seed=seed)) for seed in (0, 1, 2)}
    assert len(texts) == 3
    assert tuple(generate(model, [1], 10, seed=1)) in texts


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"beams": 1}], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_greedy(options: dict[str, Any], seed: int) -> None:
    model = Historian(seed=seed)
    assert list(generate(model, [1, 2], 9, **options)) == model.greedy([1, 2], 9)


def test_tokens_come_one_by_one_and_the_prompt_is_read_once() -> None:
    model = Historian().train()
    found = generate(model, [1, 2, 3], 5, temperature=0.0)
    assert model.calls == []
    next(found)
    assert model.calls == [(1, 3)]
    assert len(list(found)) == 4
    assert model.calls == [(1, 3), *[(1, 1)] * 4]
    assert model.training


def test_text_longer_than_the_context_is_read_anew_by_halves() -> None:
    model = Historian(context=6)
    read, text = [3, 1, 2], []
    for _ in range(20):
        text.append(int(model.logits(read).argmax()))
        read.append(text[-1])
        if len(read) > 6:
            read = read[-3:]
    assert list(generate(model, [3, 1, 2], 20, temperature=0.0)) == text


def test_long_prompt_is_cut_to_the_context() -> None:
    model = Historian(context=6)
    found = list(generate(model, [0, 0, 3, 1, 2, 1, 2, 3], 1, temperature=0.0))
    assert found == model.greedy([3, 1, 2, 1, 2, 3], 1)


@pytest.mark.parametrize("seed", range(8))
def test_enough_beams_find_the_most_likely_sequence(seed: int) -> None:
    model = Historian(vocabulary=3, seed=seed)
    every = itertools.product(range(3), repeat=5)
    best = max(every, key=lambda tokens: model.score([1], list(tokens)))
    assert tuple(generate(model, [1], 5, beams=81)) == best


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_beams_find_likelier_text_than_greedy(beams: int) -> None:
    """Not every time: greedy's text may leave the beam early and be the best in the end."""
    gains = []
    for seed in range(20):
        model = Historian(vocabulary=6, seed=seed)
        found = list(generate(model, [1, 2], 8, beams=beams))
        assert len(found) == 8
        gains.append(model.score([1, 2], found) - model.score([1, 2], model.greedy([1, 2], 8)))
    assert sum(gain > 0 for gain in gains) > sum(gain < 0 for gain in gains)
    assert sum(gains) > 0


def test_search_sums_what_its_candidates_are_worth() -> None:
    """Scores of any width are true only if every cache row follows its candidate."""
    model = Historian(vocabulary=5, seed=3)
    search = Beams(4, 6, 0.0, None)
    cache = model.eval().cache(1)
    wide, unread = model.cache(4), [[1, 2]]
    moved = 0
    for _ in range(6):
        parents = search.grow(model(torch.tensor(unread), cache).double().log_softmax(-1))
        moved += parents != [0, 1, 2, 3]
        wide.take(cache, torch.tensor(parents))
        cache, unread = wide, [candidate.tokens[-1:] for candidate in search.growing]
    assert moved > 2
    for candidate in search.growing:
        assert math.isclose(candidate.score, model.score([1, 2], candidate.tokens))


def test_tokens_come_as_soon_as_all_beams_agree() -> None:
    model = Historian(vocabulary=6, context=40, seed=1)
    whole = list(generate(model, [1], 30, beams=2))
    model.calls.clear()
    found = generate(model, [1], 30, beams=2)
    first = next(found)
    assert len(model.calls) < 30
    assert [first, *found] == whole


def chain(*steps: dict[int, float]) -> list[Tensor]:
    """Log probabilities [1, 3] for each step, of a model that looks at nothing."""
    rows = [[step.get(token, 0.0) for token in range(3)] for step in steps]
    return [torch.tensor([row]).log() for row in rows]


@pytest.mark.parametrize(("penalty", "expected"), [(0.0, [1]), (2.0, [1, 0, 0])])
def test_length_penalty_lets_longer_text_win(penalty: float, expected: list[int]) -> None:
    search = Beams(2, 3, penalty, stop=2)
    (first, second, third) = chain({1: 1.0}, {0: 0.4, 2: 0.6}, {0: 1.0})
    search.grow(first)
    rows = len(search.growing)
    search.grow(second.expand(rows, -1))
    assert search.ended is not None and search.ended.tokens == [1]
    assert search.done == (penalty == 0.0)
    if not search.done:
        search.grow(third.expand(rows, -1))
    assert search.winner() == expected


@pytest.mark.parametrize("beams", [None, 1, 3])
def test_stop_token_ends_the_text(beams: int | None) -> None:
    model = Historian(vocabulary=4, context=30, seed=5)
    options: dict[str, Any] = {"temperature": 0.0} if beams is None else {"beams": beams}
    whole = list(generate(model, [1], 20, **options))
    stop = whole[6]
    found = list(generate(model, [1], 20, stop=stop, **options))
    assert stop not in found
    if beams in (None, 1):
        assert found == whole[: whole.index(stop)]


def test_cache_rows_move_in_place_and_between_sizes() -> None:
    small, large = (Cache.empty(2, rows, 5, 2, 3, torch.zeros(1)) for rows in (2, 3))
    small.length = 4
    for layer in (*small.keys, *small.values):
        layer.copy_(torch.randn(layer.shape))
    large.take(small, torch.tensor([1, 0, 1]))
    assert large.length == 4
    before = [layer.clone() for layer in (*large.keys, *large.values)]
    for ours, theirs in zip(before, (*small.keys, *small.values), strict=True):
        assert torch.equal(ours[:, :4], theirs[[1, 0, 1], :4])
    large.take(large, torch.tensor([2, 2, 1]))
    for ours, theirs in zip((*large.keys, *large.values), before, strict=True):
        assert torch.equal(ours[:, :4], theirs[[2, 2, 1], :4])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt": []}, "prompt: expected at least one token, got 0"),
        ({"tokens": -1}, "tokens: expected 0 or more"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"beams": 0}, "beams"),
        ({"length_penalty": -1.0}, "length_penalty"),
        ({"beams": 2, "tokens": 12}, "tokens: expected at most 12 tokens with the prompt"),
        ({"beams": 2, "top_k": 3}, "beams: expected no options of sampling beside it, got 2"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, Any], text: str) -> None:
    arguments = {"prompt": [1], "tokens": 3, **options}
    with pytest.raises(ArgumentError, match=rf"\[generate\] {text}"):
        generate(Historian(), **arguments)


def test_nothing_asked_nothing_given() -> None:
    model = Historian()
    assert list(generate(model, [1], 0)) == list(generate(model, [1], 0, beams=2)) == []
    assert model.calls == []
