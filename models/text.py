"""Text that ships with Python, its byte-pair tokens, and the simplest models of it."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata

import numpy as np

from . import checkpoint
from .data import cache_folder
from .extras import require


def python_topics() -> tuple[str, str]:
    """The help texts of Python's language: the first nine tenths, and the last to test on.

    Their order is that of their names; how many characters there are depends on Python's version
    (about 465,000).
    """
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def byte_pairs(text: str, size: int) -> str:
    """A byte-pair tokenizer of `size` tokens, trained on the text; as JSON, kept in the cache."""
    require("tokenizers")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    version = metadata.version("tokenizers")
    path = cache_folder() / f"byte-pairs-{size}-{digest}-tokenizers-{version}.json"
    try:
        found = path.read_text(encoding="utf-8")
        Tokenizer(found)
    except (OSError, ValueError, KeyError, TypeError):
        found = _train_byte_pairs(text, size)
        checkpoint.write(path, lambda file: file.write(found.encode()))
    return found


def _train_byte_pairs(text: str, size: int) -> str:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    return made.to_str()


class Tokenizer:
    """Text to tokens and back, by the JSON that `byte_pairs` made.

    Raises:
        ValueError, KeyError, TypeError: text that is no such JSON.
    """

    def __init__(self, definition: str) -> None:
        require("tokenizers")
        import tokenizers

        words: dict[str, int] = json.loads(definition)["model"]["vocab"]
        self._inner = tokenizers.Tokenizer.from_str(definition)
        byte = {character: number for number, character in enumerate(_characters())}
        self.pieces = [b""] * len(words)  # the bytes of each token
        for word, token in words.items():
            self.pieces[token] = bytes(byte[character] for character in word)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text that each token completes: nothing while a character lacks bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(self.pieces[token])


def _characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary, itself if printable."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# How much the next shorter context weighs against the counts, in occurrences.
STRENGTHS = tuple(2.0**power for power in range(-3, 9))


def ngram_losses(train: bytes, test: bytes, order: int) -> list[float]:
    """Nats per byte of `test` under n-grams of bytes, n = 0 (all bytes alike) to `order`.

    P(b | context) = (count(context b) + m P(b | shorter context)) / (count(context) + m), with m
    chosen for each order on the last tenth of `train`, and counts then of all of `train`.
    """
    cut = len(train) * 9 // 10
    chosen: list[float] = []
    p = _uniform(train[cut:])
    for joint, context in _counts(train[:cut], train[cut:], order):
        options = [(joint + m * p) / (context + m) for m in STRENGTHS]
        best = min(range(len(STRENGTHS)), key=lambda i: -np.log(options[i]).sum())
        chosen.append(STRENGTHS[best])
        p = options[best]
    p = _uniform(test)
    losses = [-np.log(p).mean()]
    for m, (joint, context) in zip(chosen, _counts(train, test, order), strict=True):
        p = (joint + m * p) / (context + m)
        losses.append(-np.log(p).mean())
    return [float(loss) for loss in losses]


def _uniform(text: bytes) -> np.ndarray:
    return np.full(len(text), 1 / 256)


def _counts(train: bytes, text: bytes, order: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For n = 1 ... order: how often each n-gram of the text, and its context, occurs in `train`.

    The first bytes of the text have no context of that length, and count as unseen.
    """
    for n in range(1, order + 1):
        starts = range(1 - n, len(text) - n + 1)
        grams = Counter(train[i : i + n] for i in range(len(train) - n + 1))
        contexts = Counter(train[i : i + n - 1] for i in range(len(train) - n + 1))
        joint = np.array([grams[text[i : i + n]] if i >= 0 else 0 for i in starts])
        context = np.array([contexts[text[i : i + n - 1]] if i >= 0 else 0 for i in starts])
        yield joint, context
