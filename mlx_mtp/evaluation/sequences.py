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
    """

    ids: list[int]
    answer: list[bool]
    cut: bool = False

    @property
    def num_answer_tokens(self) -> int:
        """Number of ids in answers."""
        return sum(self.answer)
