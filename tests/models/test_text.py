"""The text that ships with Python: tokens and back, kept once made, and n-grams of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from udlkernels import ArgumentError
from udlkernels.models import text

pytest.importorskip("tokenizers")

SAMPLE = "the cat sat on the mat; the cat sat. Grüße, 日本\n\n    x = 'a'\n" * 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "udlkernels"


@pytest.fixture
def tokenizer(cache: Path) -> text.Tokenizer:
    return text.Tokenizer(text.byte_pairs(SAMPLE, 280))


def test_topics_are_split_once_and_in_order() -> None:
    train, test = text.python_topics()
    assert len(train) > 300_000
    assert (len(train) + len(test)) * 9 // 10 == len(train)
    assert (train, test) == text.python_topics()


@pytest.mark.parametrize(
    "given", [SAMPLE, "", " ", "\n\n  new wörds — 猫 \U0001f600\t", "\x00\x7f"]
)
def test_round_trip(tokenizer: text.Tokenizer, given: str) -> None:
    tokens = tokenizer.encode(given)
    assert tokenizer.decode(tokens) == given
    assert "".join(tokenizer.stream(tokens)) == given
    assert sum(len(tokenizer.pieces[token]) for token in tokens) == len(given.encode())


def test_every_byte_is_a_token_and_pairs_shorten(tokenizer: text.Tokenizer) -> None:
    assert len(tokenizer.pieces) == 280
    assert {bytes([number]) for number in range(256)} < {*tokenizer.pieces}
    assert len(tokenizer.encode(SAMPLE)) < len(SAMPLE) / 2


def test_stream_holds_back_what_is_no_character_yet(tokenizer: text.Tokenizer) -> None:
    tokens = [tokenizer.pieces.index(bytes([number])) for number in "a猫b".encode()]
    assert list(tokenizer.stream(tokens)) == ["a", "", "", "猫", "b"]
    assert list(tokenizer.stream(tokens[:3])) == ["a", "", ""]
    assert list(tokenizer.stream([*tokens[:2], tokens[0]])) == ["a", "", "�a"]


def test_tokenizer_is_trained_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = text.byte_pairs(SAMPLE, 300)
    assert text._train_byte_pairs(SAMPLE, 300) == made
    with monkeypatch.context() as patch:
        patch.setattr(text, "_train_byte_pairs", lambda *arguments: pytest.fail("trained again"))
        assert text.byte_pairs(SAMPLE, 300) == made
    assert text.byte_pairs(SAMPLE.upper(), 300) != made
    assert len([*cache.iterdir()]) == 2


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": 3}'])
def test_spoiled_cache_is_made_anew(cache: Path, content: str) -> None:
    made = text.byte_pairs(SAMPLE, 300)
    (path,) = cache.iterdir()
    path.write_text(content)
    assert text.byte_pairs(SAMPLE, 300) == made == path.read_text()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"tokenizers.*udlkernels\[models\]"):
        text.byte_pairs(SAMPLE, 300)


def test_ngrams_of_a_text_that_repeats() -> None:
    uniform, single, *longer = text.ngram_losses(b"abcabd" * 200, b"abcabd" * 50, 4)
    assert uniform == math.log(256)
    assert uniform > single > longer[0] > longer[1]
    assert longer[1] > longer[2]  # "ab" leads on to "c" or "d", which the byte before tells


def test_ngrams_are_probabilities() -> None:
    """Over all bytes they sum to 1, seen contexts or not."""
    train = SAMPLE.encode()

    def probability(given: bytes, order: int) -> float:
        return math.exp(-len(given) * text.ngram_losses(train, given, order)[order])

    for first in (b"t", b"\x00"):
        begins = probability(first, 2)
        total = sum(probability(first + bytes([second]), 2) for second in range(256))
        assert math.isclose(total, begins)
    assert math.isclose(sum(probability(bytes([byte]), 1) for byte in range(256)), 1)


def test_smoothing_is_not_chosen_on_the_text_it_is_judged_by() -> None:
    train = SAMPLE.encode()
    parts = [text.ngram_losses(train, part, 3) for part in (b"the cat", b"zzz zzz")]
    both = text.ngram_losses(train, b"the catzzz zzz", 1)
    assert math.isclose(both[1], (parts[0][1] + parts[1][1]) / 2)
