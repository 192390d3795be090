"""Byte pairs: against a plain implementation, the same every time, whole texts back, a file not trusted."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynaprune.experiment.tasks import byte_pairs
from dynaprune.experiment.tasks.byte_pairs import (
    END,
    END_OF_TEXT,
    kept_pairs,
    numbered,
    text_stream,
    tokenizer_of,
    train_pairs,
)

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

TEXTS = [
    "The film is a slow film, and the slow parts of the film are the best parts of it.",
    "Nobody in the film hurries; nobody in the theatre did either. The ending surprised everyone.",
    "A café, a theatre, another café: the film never leaves its four streets. Slowly, slowly.",
] * 3


def plain_pairs(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The first ``count`` byte pairs by counting: the most frequent one, of equals the one whose tokens have
    the lowest numbers. Words keep the space before them; GPT-2's expression for texts of these letters."""
    from tokenizers import pre_tokenizers

    numbers = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    spelled = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    others = [byte for byte in range(256) if byte not in spelled]
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word in re.findall(r" ?[^\W\d_]+| ?[^\s\w]+|\s+(?!\S)|\s+", text):
            words[tuple(spelled[byte] for byte in word.encode())] += 1
    pairs = []
    for _ in range(count):
        found: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                found[pair] += times
        best = min(found, key=lambda p: (-found[p], numbers[p[0]], numbers[p[1]]))
        pairs.append(best)
        numbers.setdefault("".join(best), len(numbers))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            tokens: list[str] = []
            for token in word:
                if tokens and (tokens[-1], token) == best:
                    tokens[-1] = "".join(best)
                    continue
                tokens.append(token)
            merged[tuple(tokens)] += times
        words = merged
    return pairs


def test_the_pairs_are_those_of_a_plain_implementation() -> None:
    assert train_pairs(TEXTS, 257 + 60) == plain_pairs(TEXTS, 60)


def test_the_vocabulary_depends_on_the_texts_alone() -> None:
    first = train_pairs(TEXTS, 400)
    assert all(train_pairs(TEXTS, 400) == first for _ in range(4))
    assert train_pairs(TEXTS[::-1], 400) == first
    assert train_pairs([*TEXTS, "zebra zebra zebra"], 400) != first
    numbers = numbered(first)
    assert list(numbers.values()) == list(range(len(numbers))) and numbers[END_OF_TEXT] == END == 0
    assert 257 < len(numbers) <= 400
    with pytest.raises(ValueError, match="more than the 256 bytes, got 256"):
        train_pairs(TEXTS, 256)


@pytest.mark.parametrize(
    "text", ["", " ", "The film", "no  such\n\nwords\t", "Ġ 東京 🎬 é", "end of text", "\x00\x7f", "\u2028½"]
)
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    tokenizer = tokenizer_of(train_pairs(TEXTS, 400))
    tokens = tokenizer.encode(text).ids
    assert tokenizer.decode(tokens) == text and END not in tokens
    assert len(tokens) <= len(text.encode())


def test_frequent_words_are_one_token() -> None:
    tokenizer = tokenizer_of(train_pairs(TEXTS, 400))
    assert len(tokenizer.encode(" film film film").ids) == 3


def test_texts_follow_each_other_with_an_end_between() -> None:
    tokenizer = tokenizer_of(train_pairs(TEXTS, 300))
    texts = ["The film", "", "a café"]
    first, _, third = (tokenizer.encode(text).ids for text in texts)
    stream = text_stream(tokenizer, texts)
    assert stream.tolist() == [END, *first, END, END, *third, END] and stream.dtype == np.int32
    for length in (1, 3, len(stream), len(stream) + 5):
        assert text_stream(tokenizer, texts, length).tolist() == stream.tolist()[:length]
    assert text_stream(tokenizer, []).tolist() == [END]


def test_a_limited_stream_reads_no_more_texts_than_it_needs() -> None:
    tokenizer = tokenizer_of(train_pairs(TEXTS, 300))

    class Counted(list[str]):
        read = 0

        def __getitem__(self, which: Any) -> Any:
            self.read = max(self.read, which.stop)
            return super().__getitem__(which)

    texts = Counted(["The film"] * 2000)
    assert len(text_stream(tokenizer, texts, 50)) == 50 and texts.read <= 200


def never(*_: Any) -> Any:
    raise AssertionError("trained again")


def test_pairs_are_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "vocabulary.json"
    pairs = kept_pairs(file, TEXTS, 320)
    assert pairs == train_pairs(TEXTS, 320) and [each.name for each in tmp_path.iterdir()] == [file.name]
    with monkeypatch.context() as patch:
        patch.setattr(byte_pairs, "train_pairs", never)
        assert kept_pairs(file, TEXTS, 320) == pairs
        for texts, entries in (([*TEXTS, "more"], 320), (TEXTS[:-1], 320), (TEXTS, 319)):
            with pytest.raises(AssertionError, match="trained again"):
                kept_pairs(file, texts, entries)
    assert kept_pairs(file, TEXTS[:1], 300) == train_pairs(TEXTS[:1], 300)
    assert kept_pairs(file, TEXTS, 320) == pairs


HOSTILE: dict[str, Any] = {
    "no JSON": "{",
    "a list": "[]",
    "no pairs": {"pairs": None},
    "pairs as text": {"pairs": "ab"},
    "three": {"pairs": [["t", "h", "e"]]},
    "numbers": {"pairs": [[1, 2]]},
    "an unknown token": {"pairs": [["th", "e"]]},
    "the end of a text": {"pairs": [["t", END_OF_TEXT]]},
    "twice": {"pairs": [["t", "h"], ["t", "h"]]},
    "too many": {"pairs": [[a, b] for a in "abcdefgh" for b in "abcdefgh"]},
    "lists in pairs": {"pairs": [[["t"], "h"]]},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_a_file_that_holds_no_pairs_is_written_anew(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    pairs = kept_pairs(file, TEXTS, 320)
    good = file.read_bytes()
    text = content if isinstance(content, str) else json.dumps(json.loads(good) | content)
    file.write_text(text, encoding="utf-8")
    assert kept_pairs(file, TEXTS, 320) == pairs
    assert file.read_bytes() == good
