"""Texts as byte pairs: a vocabulary trained on the task's own text, kept beside the runs, and text as tokens.

Byte-pair encoding: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", ACL 2016;
on bytes, so that every text has tokens and comes back from them: Radford et al., "Language Models are
Unsupervised Multitask Learners", 2019, section 2.2."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynaprune.experiment.saved_results import read_json
from dynaprune.saving.durable import write_file

__all__ = [
    "END",
    "END_OF_TEXT",
    "Pairs",
    "encoded",
    "kept_pairs",
    "numbered",
    "text_stream",
    "tokenizer_of",
    "train_pairs",
]

# Token 0. A byte pair holds no space (the byte is spelled "Ġ"), so no text spells this.
END_OF_TEXT, END = "end of text", 0
_BYTES = 256
_AT_A_TIME = 200
Pairs = list[tuple[str, str]]


def train_pairs(texts: Sequence[str], entries: int) -> Pairs:
    """The pairs of tokens that become one, in order, until there are ``entries`` tokens: the end of a text,
    the 256 bytes and a token for each pair. Fewer where the texts have no more pairs.

    The same texts give the same pairs: `tokenizers` numbers bytes by their character and breaks ties of
    frequency by these numbers.

    ValueError for fewer than 257 entries."""
    if entries <= _BYTES:
        raise ValueError(f"entries must be more than the {_BYTES} bytes, got {entries}")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splitting()
    trainer = trainers.BpeTrainer(
        vocab_size=entries - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]


def numbered(pairs: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The number of each token: the end of a text 0, then the bytes in the order of their characters, then
    what each pair becomes.

    ValueError for a pair of something that is no token before it."""
    from tokenizers import pre_tokenizers

    numbers = {END_OF_TEXT: END}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        numbers[character] = len(numbers)
    for first, second in pairs:
        if first not in numbers or second not in numbers or END_OF_TEXT in (first, second):
            raise ValueError(f"expected pairs of earlier tokens, got {first!r} and {second!r}")
        numbers.setdefault(first + second, len(numbers))
    return numbers


def tokenizer_of(pairs: Pairs) -> Any:
    """The ``tokenizers.Tokenizer`` of these pairs. ValueError as in `numbered`."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE(vocab=numbered(pairs), merges=pairs))
    tokenizer.pre_tokenizer = _splitting()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splitting() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def kept_pairs(file: Path, texts: Sequence[str], entries: int) -> Pairs:
    """The pairs in ``file`` if they were trained on these texts, else `train_pairs`, kept in ``file``.

    The file is checked as one that anybody may have changed: where it is of other texts, damaged, or no list
    of pairs, it is written anew."""
    origin = _origin(texts, entries)
    pairs = _read(file, origin, entries)
    if pairs is None:
        pairs = train_pairs(texts, entries)
        content = json.dumps({"trained_on": origin, "pairs": pairs}, ensure_ascii=False)
        write_file(file, lambda out: out.write(content.encode()))
    return pairs


def _origin(texts: Sequence[str], entries: int) -> str:
    """SHA-256 of the texts, how they are set apart, and the number of entries."""
    digest = hashlib.sha256(f"{entries} {len(texts)}".encode())
    for text in texts:
        data = text.encode()
        digest.update(f" {len(data)} ".encode() + data)
    return digest.hexdigest()


def _read(file: Path, origin: str, entries: int) -> Pairs | None:
    try:
        found = read_json(file)
        if found.get("trained_on") != origin:
            return None
        pairs = [(first, second) for first, second in found["pairs"]]
        fits = len(numbered(pairs)) <= entries and len(set(pairs)) == len(pairs)
    except (ValueError, TypeError, KeyError):
        return None
    return pairs if fits else None


def encoded(tokenizer: Any, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """The tokens of each text, int32 ``[length]``.

    Two hundred texts at a time: the library's own results take a hundred times the memory."""
    for first in range(0, len(texts), _AT_A_TIME):
        for each in tokenizer.encode_batch(list(texts[first : first + _AT_A_TIME])):
            yield np.array(each.ids, dtype=np.int32)


def text_stream(tokenizer: Any, texts: Sequence[str], tokens: int | None = None) -> np.ndarray:
    """The texts one after the other, an end of text before the first and behind each: int32 ``[length]``.

    It ends after ``tokens`` tokens, where there are so many; what would come after is not read."""
    parts, length = [np.array([END], dtype=np.int32)], 1
    for text in encoded(tokenizer, texts):
        parts += [text, parts[0]]
        length += len(text) + 1
        if tokens is not None and length >= tokens:
            break
    return np.concatenate(parts)[:tokens]
