"""Removal of records that are not worth training on: loops, near-duplicates, empty answers.

Small models fall into loops in greedy decoding, and repeat the same question when asked for one.
The checks use words and characters, not ids, so that they apply to text from anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from mlx_mtp.train.data.records import Record

SHINGLE = 5
NEAR = 0.6  # fraction of common shingles from which two prompts count as the same
_NGRAM = 4
_LOWEST_VARIETY = 0.3  # of distinct runs of words; prose has 0.95, tables and code 0.6
_MAX_PERIOD = 80


def why_degenerate(text: str) -> str | None:
    """Return the defect of an answer: "empty", "loop", "repeated line", or None."""
    if not text.strip():
        return "empty"
    words = text.split()
    if (
        _loops(words, min_length=20)
        or _loops(text.rstrip(), min_length=120)
        or _is_monotonous(words)
    ):
        return "loop"
    return "repeated line" if _repeats_a_line(text) else None


def _loops(items: Sequence[str], *, min_length: int) -> bool:
    """Whether the end repeats one run of items, over at least ``min_length`` items.

    An incomplete last repetition counts, because answers are truncated anywhere.
    """
    end = len(items)
    for period in range(1, min(_MAX_PERIOD, end // 2) + 1):
        covered = period
        while covered < end and items[end - 1 - covered] == items[end - 1 - covered + period]:
            covered += 1
        if covered >= max(min_length, (4 if period < 10 else 3) * period):
            return True
    return False


def _is_monotonous(words: Sequence[str]) -> bool:
    """Whether few runs of words make up the text, as in loops with a counter."""
    if len(words) < 60:
        return False
    runs = Counter(tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1))
    return len(runs) < _LOWEST_VARIETY * runs.total()


def _repeats_a_line(text: str) -> bool:
    """Whether a long line occurs six times and makes up a third of the text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    long_lines = Counter(line for line in lines if len(line) >= 12)
    if not long_lines:
        return False
    count = long_lines.most_common(1)[0][1]
    return count >= 6 and 3 * count >= len(lines)


class Seen:
    """A set of texts that detects near-duplicates.

    Two texts are duplicates if their words are the same, ignoring case and punctuation, or if they
    share ``NEAR`` of their runs of five words (Jaccard).
    """

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._sizes: list[int] = []
        self._where: dict[tuple[str, ...], list[int]] = {}

    def add(self, text: str) -> bool:
        """Add a text; return False, and do not add it, if it is a near-duplicate."""
        words = words_of(text)
        if self._has(words):
            return False
        shingles = _shingles(words)
        self._exact.add(" ".join(words))
        for shingle in shingles:
            self._where.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(shingles))
        return True

    def has(self, text: str) -> bool:
        """Whether a text is a near-duplicate."""
        return self._has(words_of(text))

    def _has(self, words: Sequence[str]) -> bool:
        if " ".join(words) in self._exact:
            return True
        shingles = _shingles(words)
        shared = Counter(text for item in shingles for text in self._where.get(item, ()))
        return any(
            count >= NEAR * (len(shingles) + self._sizes[text] - count)
            for text, count in shared.items()
        )


def clean(
    records: Iterable[Record], *, seen: Seen | None = None
) -> tuple[list[Record], Counter[str]]:
    """Drop records that are empty, loop, or nearly repeat another one.

    Truncated answers stay; they are marked (``meta["cut"]``).

    Returns:
        The remaining records, in order, and the number of dropped ones by reason.
    """
    seen = Seen() if seen is None else seen
    kept: list[Record] = []
    dropped: Counter[str] = Counter()
    for record in records:
        defects = [why_degenerate(answer) for answer in record.answers]
        reason = next((defect for defect in defects if defect), None)
        if reason is None and not defects:
            reason = "no answer"
        if reason is None and not seen.add(record.prompt):
            reason = "duplicate"
        if reason is None:
            kept.append(record)
        else:
            dropped[reason] += 1
    return kept, dropped


def words_of(text: str) -> list[str]:
    """Words without case and punctuation; languages without spaces are split by character."""
    words = re.findall(r"\w+", text.casefold())
    return [piece for word in words for piece in ([word] if word.isascii() else _pieces(word))]


def _pieces(word: str) -> list[str]:
    """Split text without word borders: Chinese, Japanese, Thai."""
    return re.findall(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u9fff]+|\w", word)


def _shingles(words: Sequence[str]) -> set[tuple[str, ...]]:
    size = min(SHINGLE, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if size else set()
