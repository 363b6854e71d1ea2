"""A trace: at every place of some answers, how many mask drafts would have held.

Which drafts hold behind a token depends on the text before it alone (``train.evaluate``), and fewer
masks only cut the run short.  So these counts are all that a decode of the same text needs to
know, whatever its layouts: a trace can be replayed under every planner and every cost curve.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_mtp.storage.files import write_atomically

if TYPE_CHECKING:
    from mlx_mtp.evaluation.greedy_texts import GreedyText
    from mlx_mtp.model.mtp_model import MTPModel

FORMAT = "mlx-mtp acceptance trace 1"
SHIPPED = "trace.json"
_DIGITS = string.digits + string.ascii_lowercase  # one letter a count


@dataclass(frozen=True)
class TracedAnswer:
    """One answer.

    Attributes:
        id: of its prompt.
        kind: of its prompt.
        prompt: ids of the prompt.
        counts: after each token but the last, how many mask drafts would hold, ``[tokens - 1]``.
    """

    id: str
    kind: str
    prompt: int
    counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.counts) + 1


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Answers of one model with one adapter.

    Attributes:
        answers: in the order in which they are replayed.
        num_draft_tokens: k, the most that a count can be.
        max_tokens: where longer answers were cut.
        shares: what the adapter's configuration says of its drafts, which planners begin with.
        source: what it was recorded with, for people.
    """

    answers: tuple[TracedAnswer, ...]
    num_draft_tokens: int
    max_tokens: int
    shares: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        k, shares = self.num_draft_tokens, self.shares
        if not 1 <= k < len(_DIGITS):
            raise ValueError(f"num_draft_tokens must be 1 to {len(_DIGITS) - 1}, got {k}")
        if not self.answers:
            raise ValueError("it holds no answers")
        if not all(0 <= each <= 1 for each in shares) or list(shares) != sorted(shares)[::-1]:
            raise ValueError(f"shares must fall within 0 to 1, got {list(shares)}")
        for each in self.answers:
            if each.prompt < 1 or each.num_tokens > self.max_tokens:
                raise ValueError(
                    f"{each.id} has {each.prompt} prompt ids and {each.num_tokens} tokens; wanted "
                    f"are at least 1 and at most {self.max_tokens}"
                )
            room = range(len(each.counts), 0, -1)
            for count, most in zip(each.counts, room, strict=True):
                if not 0 <= count <= min(k, most):
                    raise ValueError(f"{each.id} counts {count} where {min(k, most)} is the most")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of text, in order of appearance."""
        return tuple(dict.fromkeys(each.kind for each in self.answers))

    def of_kind(self, kinds: Iterable[str]) -> Trace:
        """The answers of some kinds.

        Raises:
            ValueError: there is no such kind.
        """
        wanted = set(kinds)
        if unknown := sorted(wanted - set(self.kinds)):
            raise ValueError(f"the trace has the kinds {', '.join(self.kinds)}, not {unknown[0]!r}")
        answers = tuple(each for each in self.answers if each.kind in wanted)
        return replace(self, answers=answers)

    def limited(self, num_draft_tokens: int) -> Trace:
        """The same answers with fewer masks.

        Raises:
            ValueError: there are not so many in the trace, or it is less than one.
        """
        k = num_draft_tokens
        if not 1 <= k <= self.num_draft_tokens:
            raise ValueError(
                f"k must be between 1 and the trace's {self.num_draft_tokens}, got {k}"
            )
        answers = tuple(
            replace(each, counts=tuple(min(count, k) for count in each.counts))
            for each in self.answers
        )
        shares = self.shares[:k]
        return replace(self, answers=answers, num_draft_tokens=k, shares=shares)

    def holds(self, num_draft_tokens: int | None = None) -> np.ndarray:
        """Share of places behind which at least j drafts hold, ``[k + 1]``, 1.0 at j = 0.

        Places whose answer ends before could not have had j drafts and do not count.
        """
        k = self.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
        counts = np.concatenate([np.array(each.counts, dtype=int) for each in self.answers])
        rooms = np.concatenate([np.arange(len(each.counts), 0, -1) for each in self.answers])
        shares = [1.0]
        for j in range(1, k + 1):
            could = rooms >= j
            shares.append(float((counts[could] >= j).mean()) if could.any() else 0.0)
        return np.minimum.accumulate(np.array(shares))

    def to_json(self) -> str:
        """As a file: a head, and one line for each answer."""
        head = {
            "format": FORMAT,
            "source": self.source,
            "num_draft_tokens": self.num_draft_tokens,
            "max_tokens": self.max_tokens,
            "shares": list(self.shares),
        }
        lines = [
            json.dumps({**vars(each), "counts": "".join(_DIGITS[count] for count in each.counts)})
            for each in self.answers
        ]
        answers = ",\n  ".join(lines)
        return json.dumps(head, indent=1)[:-2] + f',\n "answers": [\n  {answers}\n ]\n}}\n'

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trace:
        """Build from the JSON that ``to_json`` gave.

        Raises:
            ValueError: something is missing or cannot be.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"not an acceptance trace (no format {FORMAT!r})")
        try:
            answers = [
                TracedAnswer(
                    str(each["id"]), str(each["kind"]), int(each["prompt"]),
                    tuple(_count(letter, str(each["id"])) for letter in str(each["counts"])),
                )
                for each in values["answers"]
            ]  # fmt: skip
            return cls(
                answers=tuple(answers),
                num_draft_tokens=int(values["num_draft_tokens"]),
                max_tokens=int(values["max_tokens"]),
                shares=tuple(float(each) for each in values["shares"]),
                source=str(values.get("source", "")),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an acceptance trace: {error!r}") from None


def _count(letter: str, answer: str) -> int:
    count = _DIGITS.find(letter)
    if count < 0:
        raise ValueError(f"{answer} has the count {letter!r}")
    return count


def read_trace(path: Path | None = None) -> Trace:
    """Read a trace; the shipped one by default.

    Raises:
        ValueError: the file holds no trace, or is damaged.
        OSError: it cannot be read.
    """
    source = files("mlx_mtp.simulate") / SHIPPED if path is None else path
    try:
        return Trace.from_dict(json.loads(source.read_bytes().decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path or SHIPPED}: {error}") from None


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace, whole or not at all."""
    write_atomically(path, trace.to_json())


def record(
    model: MTPModel,
    texts: Sequence[GreedyText],
    *,
    max_tokens: int,
    source: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Count the drafts that hold along greedy answers; about 6 s an answer of 64 on one core.

    Args:
        model: with its adapter.
        texts: the answers; from each as many tokens as wanted.
        max_tokens: most tokens of an answer.
        source: for people.
        progress: called with (answers done, answers in all).

    Raises:
        ValueError: the model has no adapter, or there are no answers.
    """
    from mlx_mtp.evaluation.acceptance import checked_num_masks, count_answers

    k = checked_num_masks(model, None)
    sequences = [each.sequence for each in texts]
    answers = []
    for found in count_answers(model, sequences, max_tokens=max_tokens, progress=progress):
        text = texts[found.sequence]
        room = np.arange(len(found.counts), 0, -1)  # drafts behind the cut are never emitted
        counts = np.minimum(found.counts, room).tolist()
        answers.append(TracedAnswer(text.id, text.kind, len(text.prompt), tuple(counts)))
    assert model.config is not None
    return Trace(
        answers=tuple(answers),
        num_draft_tokens=k,
        max_tokens=max_tokens,
        shares=tuple(model.config.acceptance),
        source=source,
    )
