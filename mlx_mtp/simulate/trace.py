"""Traces: how many mask drafts are accepted after each token of recorded answers.

Which drafts are accepted after a token depends only on the text up to it (``evaluation``), and
fewer masks only truncate the counts.  So the counts determine the steps of decoding the same text
in any layout: a trace can be replayed with every planner and every cost curve.
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
_DIGITS = string.digits + string.ascii_lowercase  # one character per count


@dataclass(frozen=True)
class TracedAnswer:
    """One answer.

    Attributes:
        id: id of its prompt.
        kind: kind of its prompt.
        prompt: number of ids of the prompt.
        counts: accepted mask drafts after each token but the last, ``[tokens - 1]``.
    """

    id: str
    kind: str
    prompt: int
    counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.counts) + 1

    def rooms(self) -> range:
        """Number of tokens that follow each token but the last, ``[tokens - 1]``."""
        return range(len(self.counts), 0, -1)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Answers of one model with one adapter.

    Attributes:
        answers: the answers, in the order in which they are replayed.
        num_draft_tokens: k, the maximum of a count.
        max_tokens: length to which longer answers were truncated.
        shares: acceptance in the adapter's configuration, from which planners start, ``[k]``.
        source: what it was recorded with.
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
            raise ValueError("the trace has no answers")
        if list(shares) != sorted(shares, reverse=True) or not all(0 <= x <= 1 for x in shares):
            raise ValueError(f"shares must be between 0 and 1 and not increase, got {list(shares)}")
        for answer in self.answers:
            if answer.prompt < 1 or answer.num_tokens > self.max_tokens:
                raise ValueError(
                    f"{answer.id} has {answer.prompt} prompt ids and {answer.num_tokens} tokens; "
                    f"expected at least 1 and at most {self.max_tokens}"
                )
            for count, room in zip(answer.counts, answer.rooms(), strict=True):
                if not 0 <= count <= min(k, room):
                    raise ValueError(f"{answer.id} has count {count}, expected 0 to {min(k, room)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of text, in order of appearance."""
        return tuple(dict.fromkeys(answer.kind for answer in self.answers))

    def of_kind(self, kinds: Iterable[str]) -> Trace:
        """Return a trace with only the answers of these kinds.

        Raises:
            ValueError: a kind does not occur.
        """
        kinds = set(kinds)
        if unknown := sorted(kinds - set(self.kinds)):
            raise ValueError(f"the trace has the kinds {', '.join(self.kinds)}, not {unknown[0]!r}")
        answers = tuple(answer for answer in self.answers if answer.kind in kinds)
        return replace(self, answers=answers)

    def limited(self, num_draft_tokens: int) -> Trace:
        """Return a trace of the same answers with fewer masks.

        Raises:
            ValueError: ``num_draft_tokens`` is more than that of the trace, or less than one.
        """
        k = num_draft_tokens
        if not 1 <= k <= self.num_draft_tokens:
            raise ValueError(
                f"k must be between 1 and the trace's {self.num_draft_tokens}, got {k}"
            )
        answers = tuple(
            replace(answer, counts=tuple(min(count, k) for count in answer.counts))
            for answer in self.answers
        )
        return replace(self, answers=answers, num_draft_tokens=k, shares=self.shares[:k])

    def prefix_probs(self) -> np.ndarray:
        """Probability that at least j drafts are accepted, ``[k + 1]``, 1.0 at j = 0.

        Only positions with at least j more tokens count for j.
        """
        counts = np.array([count for answer in self.answers for count in answer.counts], int)
        rooms = np.array([room for answer in self.answers for room in answer.rooms()], int)
        probs = [1.0]
        for j in range(1, self.num_draft_tokens + 1):
            has_room = rooms >= j
            probs.append(float((counts[has_room] >= j).mean()) if has_room.any() else 0.0)
        return np.minimum.accumulate(np.array(probs))

    def to_json(self) -> str:
        """Return the text of a trace file: a head, and one line for each answer."""
        head = {
            "format": FORMAT,
            "source": self.source,
            "num_draft_tokens": self.num_draft_tokens,
            "max_tokens": self.max_tokens,
            "shares": list(self.shares),
        }
        lines = [
            json.dumps(vars(answer) | {"counts": "".join(_DIGITS[c] for c in answer.counts)})
            for answer in self.answers
        ]
        answers = ",\n  ".join(lines)
        return json.dumps(head, indent=1)[:-2] + f',\n "answers": [\n  {answers}\n ]\n}}\n'

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trace:
        """Build from the values of a trace file.

        Raises:
            ValueError: a value is missing or impossible.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f"not an acceptance trace (no format {FORMAT!r})")
        try:
            answers = [
                TracedAnswer(
                    str(item["id"]), str(item["kind"]), int(item["prompt"]),
                    tuple(_count(digit, str(item["id"])) for digit in str(item["counts"])),
                )
                for item in values["answers"]
            ]  # fmt: skip
            return cls(
                answers=tuple(answers),
                num_draft_tokens=int(values["num_draft_tokens"]),
                max_tokens=int(values["max_tokens"]),
                shares=tuple(float(share) for share in values["shares"]),
                source=str(values.get("source", "")),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an acceptance trace: {error!r}") from None


def _count(digit: str, answer: str) -> int:
    count = _DIGITS.find(digit)
    if count < 0:
        raise ValueError(f"{answer} has the count {digit!r}")
    return count


def read_trace(path: Path | None = None) -> Trace:
    """Read a trace; the included one by default.

    Raises:
        ValueError: the file is not a trace, or is damaged.
        OSError: it cannot be read.
    """
    source = files("mlx_mtp.simulate") / SHIPPED if path is None else path
    try:
        return Trace.from_dict(json.loads(source.read_bytes().decode("utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path or SHIPPED}: {error}") from None


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace atomically."""
    write_atomically(path, trace.to_json())


def record(
    model: MTPModel,
    texts: Sequence[GreedyText],
    *,
    max_tokens: int,
    source: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Count the accepted drafts of greedy answers; about 6 s per answer of 64 tokens on one core.

    Args:
        model: a model with an adapter.
        texts: the answers.
        max_tokens: maximum tokens of an answer; longer ones are truncated.
        source: description for the trace.
        progress: called with the numbers of finished answers and of all answers.

    Raises:
        ValueError: the model has no adapter, or there are no answers.
    """
    from mlx_mtp.evaluation.acceptance import checked_num_masks, count_answers

    k = checked_num_masks(model, None)
    sequences = [text.sequence for text in texts]
    answers = []
    for answer in count_answers(model, sequences, max_tokens=max_tokens, progress=progress):
        text = texts[answer.sequence]
        room = np.arange(len(answer.counts), 0, -1)  # drafts after the cut are never emitted
        counts = np.minimum(answer.counts, room).tolist()
        answers.append(TracedAnswer(text.id, text.kind, len(text.prompt), tuple(counts)))
    assert model.adapter_config is not None
    return Trace(
        answers=tuple(answers),
        num_draft_tokens=k,
        max_tokens=max_tokens,
        shares=tuple(model.adapter_config.acceptance),
        source=source,
    )
