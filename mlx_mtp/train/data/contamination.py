"""Whether training text repeats the prompts that adapters are measured with.

Two texts share a run if eight words in a row are the same, ignoring case and punctuation
(``clean``'s words).  Declared framing phrases ("complete the following Python function") are cut
out of both first, and runs of numbers alone do not count: lists count from 1 to 8 everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mlx_mtp.evaluation.prompt_sets import BUILTIN, HUMAN_EVAL, prompts_of
from mlx_mtp.train.data.clean import words_of
from mlx_mtp.train.data.records import Record

BENCHMARKS = (BUILTIN, HUMAN_EVAL)
RUN_WORDS = 8
FRAMING = (
    "complete the following python function",
    "complete this python function",
    "from typing import dict list optional tuple",
    "from typing import any list",
    "from typing import list tuple",
    "from typing import list",
    "summarise the following text in two sentences",
)

Run = tuple[str, ...]


class Benchmarks:
    """The runs of words of sets of prompts.

    Args:
        sets: prompts by the name of their set.
    """

    def __init__(self, sets: Mapping[str, Iterable[str]]) -> None:
        self.names = tuple(sets)
        self._sets_of: dict[Run, set[str]] = {}
        for name, texts in sets.items():
            for text in texts:
                for run in _runs(text):
                    self._sets_of.setdefault(run, set()).add(name)

    def shared(self, text: str) -> dict[str, list[str]]:
        """The runs that a text shares with prompts, in its order, by the name of their set."""
        found: dict[str, list[str]] = {}
        for run in _runs(text):
            for name in sorted(self._sets_of.get(run, ())):
                found.setdefault(name, []).append(" ".join(run))
        return found


def benchmarks(names: Iterable[str] = BENCHMARKS) -> tuple[Benchmarks, list[str]]:
    """The built-in prompts, and HumanEval if it is installed; and lines about what is missing."""
    sets, missing = {}, []
    for name in names:
        try:
            sets[name] = [prompt.text for prompt in prompts_of(name)]
        except ValueError as error:
            missing.append(f"Texts are not compared with {name}: {error}")
    return Benchmarks(sets), missing


@dataclass
class Contamination:
    """Texts that share runs of words with prompts of benchmarks.

    Attributes:
        names: the sets that texts were compared with.
        num_compared: number of texts.
        num_shared: number of texts that share a run with any of them.
        counts: texts that share a run, by the name of the set.
    """

    names: tuple[str, ...] = ()
    num_compared: int = 0
    num_shared: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, shared: Mapping[str, object]) -> None:
        """Count a text by the result of ``Benchmarks.shared``."""
        self.num_compared += 1
        self.num_shared += bool(shared)
        self.counts.update(shared.keys())

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[name]} with {name}" for name in self.names)
        return (
            f"{self.num_shared} of {self.num_compared} texts share {RUN_WORDS} words in a row with "
            f"prompts of benchmarks ({counts}) and are left out"
        )


def without_shared(
    records: Iterable[Record], sets: Benchmarks
) -> tuple[list[Record], Contamination]:
    """The records that share no run with a prompt, and the counts of the others."""
    counts = Contamination(sets.names)
    kept = []
    for record in records:
        shared = sets.shared(text_of(record))
        counts.add(shared)
        if not shared:
            kept.append(record)
    return kept, counts


def text_of(record: Record) -> str:
    """All text of a record; messages are separate paragraphs."""
    if record.messages is None:
        return record.text or ""
    return "\n\n".join(message["content"] for message in record.messages)


def _runs(text: str) -> list[Run]:
    """Runs of words outside framing phrases, in order."""
    return [
        tuple(part[start : start + RUN_WORDS])
        for part in _parts(words_of(text))
        for start in range(len(part) - RUN_WORDS + 1)
        if not all(word.isdecimal() for word in part[start : start + RUN_WORDS])
    ]


def _parts(words: Sequence[str]) -> list[list[str]]:
    """Words between framing phrases."""
    parts: list[list[str]] = [[]]
    index = 0
    while index < len(words):
        phrase = next((p for p in _FRAMING if tuple(words[index : index + len(p)]) == p), None)
        if phrase is None:
            parts[-1].append(words[index])
            index += 1
        else:
            parts.append([])
            index += len(phrase)
    return parts


_FRAMING = sorted((tuple(words_of(phrase)) for phrase in FRAMING), key=len, reverse=True)
