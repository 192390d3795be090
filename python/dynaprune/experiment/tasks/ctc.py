"""Speech recognition by connectionist temporal classification: characters, losses, decoding and error rates.

Symbols are numbers: 0 the blank, 1 the space between words, 2 any character that the training transcripts do
not have, then those that they have, in order."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from dynaprune.experiment.tasks.audio import IGNORED

__all__ = [
    "BLANK",
    "SPACE",
    "UNKNOWN",
    "encode",
    "error_rates",
    "greedy",
    "losses_per_symbol",
    "plain_text",
    "vocabulary",
]

BLANK, SPACE, UNKNOWN = 0, 1, 2
_FIRST = 3
_PRIVATE_USE = 0xE000


def plain_text(sentence: str) -> str:
    """Lower case, composed accents (NFKC), without punctuation and symbols, one space between words; the
    apostrophe within a word stays."""
    text = unicodedata.normalize("NFKC", sentence).lower().replace("\u2019", "'")
    kept = "".join(" " if unicodedata.category(c)[0] in "PSZC" and c != "'" else c for c in text)
    return " ".join(word for word in (w.strip("'") for w in kept.split()) if word)


def vocabulary(texts: Iterable[str]) -> list[str]:
    """The characters of ``texts`` but for the space, in order: symbol ``3 + i`` is the i-th."""
    return sorted(set("".join(texts)) - {" "})


def encode(text: str, characters: Sequence[str]) -> torch.Tensor:
    """The symbols of ``text``, int64 ``[len(text)]``."""
    number = {character: _FIRST + i for i, character in enumerate(characters)}
    symbols = [SPACE if c == " " else number.get(c, UNKNOWN) for c in text]
    return torch.tensor(symbols, dtype=torch.int64)


def losses_per_symbol(logits: torch.Tensor, frames: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One CTC loss per clip over its number of symbols, float32 ``[n]`` in nats (Graves et al. 2006).

    Args:
        logits: ``[n, time, symbols]``; computed in float32 whatever their dtype.
        frames: how many of the ``time`` frames belong to each clip, int64 ``[n]``.
        targets: int64 ``[n, longest]``, filled up with ``IGNORED``.

    ValueError for a clip that has fewer frames than its text needs: its loss would be infinite."""
    given = targets != IGNORED
    counts = given.sum(-1)
    equal = (targets[:, 1:] == targets[:, :-1]) & given[:, 1:]
    short = (frames < counts + equal.sum(-1)).nonzero().flatten().tolist()
    if short:
        raise ValueError(
            f"expected at least as many frames as symbols (and one between equal ones), got "
            f"{int(frames[short[0]])} frames for {int(counts[short[0]])} symbols"
        )
    likelihoods = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    losses = F.ctc_loss(likelihoods, targets[given], frames, counts, blank=BLANK, reduction="none")
    return losses / counts


def greedy(logits: torch.Tensor, frames: torch.Tensor) -> list[list[int]]:
    """The likeliest symbol of each frame, repetitions merged, then blanks dropped: symbols by clip."""
    best = logits.argmax(-1).cpu()
    found = []
    for row, count in zip(best, frames.tolist(), strict=True):
        merged = torch.unique_consecutive(row[:count])
        found.append(merged[merged != BLANK].tolist())
    return found


def _spelled(symbols: Iterable[int]) -> str:
    """Symbols as text in which every character but the space is a private stand-in: error rates count equal
    and unequal ones only."""
    return "".join(" " if s == SPACE else chr(_PRIVATE_USE + s) for s in symbols if s not in (IGNORED, BLANK))


def error_rates(truth: Sequence[Sequence[int]], guess: Sequence[Sequence[int]]) -> dict[str, float]:
    """Word and character error rate by jiwer (edits over the reference's length; may exceed 1), and from the
    same alignment of words, both 0..1: ``accuracy`` the share of spoken words that were recognised, ``f1``
    the harmonic mean of it and the share of written words that are right."""
    import jiwer

    spoken, written = [_spelled(t) for t in truth], [_spelled(g) for g in guess]
    words = jiwer.process_words(spoken, written)
    wrong = 2 * words.substitutions + words.deletions + words.insertions
    return {
        "accuracy": words.hits / (words.hits + words.substitutions + words.deletions),
        "f1": 2 * words.hits / (2 * words.hits + wrong),
        "wer": float(words.wer),
        "cer": float(jiwer.cer(spoken, written)),
    }
