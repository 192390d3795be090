"""Texts as word pieces: a vocabulary trained on the task's own text or read from a file, and data sets.

A data set keeps the whole texts as one array of tokens. Samples are cut to the first quarter and the last
three quarters of the length (a review's verdict tends to stand at its end; Sun et al., "How to Fine-Tune BERT
for Text Classification?", 2019, found head and tail best)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["Texts", "collate", "drop_words", "encode", "read_vocabulary", "tokenizer_of", "train_vocabulary"]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_RARE_CHARACTER = 20
_AT_A_TIME = 1000
_DROPPED = 0.2
Sample = tuple[dict[str, torch.Tensor], torch.Tensor]


def train_vocabulary(texts: Sequence[str], entries: int) -> list[str]:
    """Word pieces of ``texts``, at most ``entries``: the special tokens first, then in alphabetical order.

    The same texts give the same vocabulary: `tokenizers` numbers the pieces differently from run to run, and
    breaks ties by these numbers, unless it is given the characters in an order. Characters seen fewer than 20
    times become unknown."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _splitting()
    normalize = tokenizer.normalizer.normalize_str
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalize(text))
    alphabet = sorted(c for c, n in counts.items() if n >= _RARE_CHARACTER and not c.isspace())
    inside = [f"##{character}" for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=entries,
        special_tokens=[*SPECIAL, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [*SPECIAL, *sorted(set(tokenizer.get_vocab()) - set(SPECIAL))]


def read_vocabulary(path: Path) -> list[str]:
    """The word pieces of a ``vocab.txt``, one a line; ValueError where a special token is missing."""
    vocabulary = path.read_text(encoding="utf-8").splitlines()
    if missing := [token for token in SPECIAL if token not in vocabulary]:
        raise ValueError(f"expected a vocabulary with {', '.join(SPECIAL)}, {path.name} lacks {missing}")
    return vocabulary


def fingerprint(vocabulary: Sequence[str]) -> str:
    """SHA-256 of the word pieces in their order."""
    return hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()


def _splitting() -> tuple[Any, Any]:
    from tokenizers import normalizers, pre_tokenizers

    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()


def tokenizer_of(vocabulary: Sequence[str]) -> Any:
    """BERT's uncased tokenizer with this vocabulary, as transformers has it (``PreTrainedTokenizerFast``)."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = {piece: number for number, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(vocab=pieces, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _splitting()
    pad, unknown, start, end, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        cls_token=start,
        sep_token=end,
        mask_token=mask,
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each text, whole and without special ones: int32 ``[length]``.

    A thousand texts at a time: the library's own results take a hundred times the memory."""
    found: list[np.ndarray] = []
    for first in range(0, len(texts), _AT_A_TIME):
        part = list(texts[first : first + _AT_A_TIME])
        encoded = tokenizer.backend_tokenizer.encode_batch(part, add_special_tokens=False)
        found += [np.array(each.ids, dtype=np.int32) for each in encoded]
    return found


class Texts(Dataset[Any]):
    """``({"input_ids", "attention_mask"}, label)``, all int64: ``[CLS]``, the text's tokens, ``[SEP]``.

    Args:
        tokens: of each text, whole.
        labels: int ``[n]``.
        max_length: tokens of a sample at most, special ones included.
        padded: every sample is padded to ``max_length``. Without it `collate` pads to the longest of a batch.

    Raises:
        ValueError: a length below 8."""

    def __init__(
        self,
        tokens: Sequence[np.ndarray],
        labels: np.ndarray,
        tokenizer: Any,
        max_length: int,
        *,
        padded: bool,
    ) -> None:
        if max_length < 8:
            raise ValueError(f"max_length must be at least 8 tokens, got {max_length}")
        self.ends = np.cumsum([len(each) for each in tokens])
        self.flat = np.concatenate(tokens)
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))
        self.start, self.end = int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)
        self.padding = int(tokenizer.pad_token_id)
        self.max_length, self.padded = max_length, padded

    def __len__(self) -> int:
        return len(self.labels)

    def text(self, row: int) -> np.ndarray:
        """All tokens of one text, int32, without special ones."""
        return self.flat[self.ends[row - 1] if row else 0 : self.ends[row]]

    def __getitem__(self, row: int) -> Sample:
        text, room = self.text(row), self.max_length - 2
        if len(text) > room:
            text = np.concatenate([text[: room // 4], text[len(text) - (room - room // 4) :]])
        length = len(text) + 2
        ids = np.full(self.max_length if self.padded else length, self.padding, dtype=np.int64)
        ids[0], ids[1 : length - 1], ids[length - 1] = self.start, text, self.end
        mask = np.zeros(len(ids), dtype=np.int64)
        mask[:length] = 1
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return inputs, self.labels[row]


def collate(samples: list[Sample]) -> Sample:
    """One batch, padded on the right to its longest sample (with token 0, which all vocabularies here have as
    padding, masked out)."""
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([inputs[name] for inputs, _ in samples], batch_first=True)
        for name in samples[0][0]
    }
    return batch, torch.stack([label for _, label in samples])


def drop_words(inputs: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch in which nothing attends to a fifth of the tokens, drawn by ``generator``; never of the first,
    which the classifier reads.

    Word dropout: Iyyer et al., "Deep Unordered Composition Rivals Syntactic Methods for Text Classification",
    ACL 2015, section 2.2."""
    mask = inputs["attention_mask"]
    kept = torch.rand(mask.shape, generator=generator) >= _DROPPED
    kept[:, 0] = True
    return {**inputs, "attention_mask": mask * kept.to(mask.device, mask.dtype)}
