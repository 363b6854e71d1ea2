"""What is not worth training on: loops, near-duplicates, nothing at all.

Small models fall into loops when they choose the likeliest token, and ask the same question again
and again when they are asked for one.  The checks look at words and characters, never at ids, so
that they hold for text from anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from mlx_mtp.train.data.records import Record

SHINGLE = 5
NEAR = 0.6  # share of common shingles from which two prompts are the same one
_NGRAM = 4
_LOWEST_VARIETY = 0.3  # of distinct runs of words; prose has 0.95, tables and code 0.6
_MAX_PERIOD = 80


def why_degenerate(text: str) -> str | None:
    """Say what is wrong with an answer: "empty", "loop", "repeated line", or None."""
    if not text.strip():
        return "empty"
    words = text.split()
    if _loops(words, least=20) or _loops(text.rstrip(), least=120) or _is_monotonous(words):
        return "loop"
    return "repeated line" if _repeats_a_line(text) else None


def _loops(items: Sequence[str], *, least: int) -> bool:
    """Whether the end is one run of items over and over, of at least that length.

    A last round that is not complete counts: answers are cut anywhere.
    """
    end = len(items)
    for period in range(1, min(_MAX_PERIOD, end // 2) + 1):
        covered = period
        while covered < end and items[end - 1 - covered] == items[end - 1 - covered + period]:
            covered += 1
        if covered >= max(least, (4 if period < 10 else 3) * period):
            return True
    return False


def _is_monotonous(words: Sequence[str]) -> bool:
    """Whether few runs of words make up the text; finds loops with a counter in them too."""
    if len(words) < 60:
        return False
    runs = Counter(tuple(words[at : at + _NGRAM]) for at in range(len(words) - _NGRAM + 1))
    return len(runs) < _LOWEST_VARIETY * runs.total()


def _repeats_a_line(text: str) -> bool:
    """Whether a line of some length comes back six times and makes up a third of the text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    long_lines = Counter(line for line in lines if len(line) >= 12)
    if not long_lines:
        return False
    most = long_lines.most_common(1)[0][1]
    return most >= 6 and 3 * most >= len(lines)


class Seen:
    """Remembers texts and tells whether a new one is nearly one of them.

    Two texts are the same when their words are, whatever the case and punctuation, or when they
    share ``NEAR`` of their runs of five words (Jaccard).
    """

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._sizes: list[int] = []
        self._where: dict[tuple[str, ...], list[int]] = {}

    def add(self, text: str) -> bool:
        """Remember a text; return False, and forget it, when it was nearly there already."""
        words = _words(text)
        if self._has(words):
            return False
        shingles = _shingles(words)
        self._exact.add(" ".join(words))
        for shingle in shingles:
            self._where.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(shingles))
        return True

    def has(self, text: str) -> bool:
        """Tell whether a text is nearly there."""
        return self._has(_words(text))

    def _has(self, words: Sequence[str]) -> bool:
        if " ".join(words) in self._exact:
            return True
        shingles = _shingles(words)
        shared = Counter(at for each in shingles for at in self._where.get(each, ()))
        return any(
            count >= NEAR * (len(shingles) + self._sizes[at] - count)
            for at, count in shared.items()
        )


def clean(
    records: Iterable[Record], *, seen: Seen | None = None
) -> tuple[list[Record], Counter[str]]:
    """Drop records that are empty, loop, or nearly repeat another one.

    Answers that were cut stay; they are marked as such (``meta["cut"]``).

    Returns:
        What is left, in order, and how many were dropped by reason.
    """
    seen = Seen() if seen is None else seen
    kept: list[Record] = []
    dropped: Counter[str] = Counter()
    for record in records:
        found = [why_degenerate(answer) for answer in record.answers]
        reason = next((each for each in found if each), None)
        if reason is None and not found:
            reason = "no answer"
        if reason is None and not seen.add(record.prompt):
            reason = "duplicate"
        if reason is None:
            kept.append(record)
        else:
            dropped[reason] += 1
    return kept, dropped


def _words(text: str) -> list[str]:
    """Words without case and punctuation; languages without spaces are taken by character."""
    words = re.findall(r"\w+", text.casefold())
    return [piece for word in words for piece in ([word] if word.isascii() else _pieces(word))]


def _pieces(word: str) -> list[str]:
    """Split what has no word borders: Chinese, Japanese, Thai."""
    return re.findall(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u9fff]+|\w", word)


def _shingles(words: Sequence[str]) -> set[tuple[str, ...]]:
    size = min(SHINGLE, len(words))
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)} if size else set()
