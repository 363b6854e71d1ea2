"""A text as token ids, of which some are answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenSequence:
    """A text as ids.

    Attributes:
        ids: ``[L]``.
        answer: for each id, whether it belongs to an answer, ``[L]``.
        cut: whether the text was truncated.
        kind: kind of the text, by which acceptance is counted; empty if it is not known.
    """

    ids: list[int]
    answer: list[bool]
    cut: bool = False
    kind: str = ""

    @property
    def num_answer_tokens(self) -> int:
        """Number of ids in answers."""
        return sum(self.answer)
