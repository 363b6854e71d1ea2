"""The protocol of what proposes draft tokens, and the drafts themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import mlx.core as mx

from mlx_mtp.model.layout import StepLayout

Distribution = Callable[[mx.array], mx.array]
"""Turns logits ``[..., V]`` into the probabilities that tokens are drawn from."""


@dataclass(frozen=True)
class Drafts:
    """Drafts to verify, on the device.

    Attributes:
        tokens: draft ids, int32 ``[m]``.
        candidates: ids that the draft distributions are over, ``[m, S]``.
        probs: the distributions that the drafts were drawn from, ``[m, S]``; one-hot when greedy.
        host_ids: ``tokens`` on the host, once a sync has brought them there.
    """

    tokens: mx.array
    candidates: mx.array
    probs: mx.array
    host_ids: list[int] | None = None

    @classmethod
    def none(cls) -> Drafts:
        """No drafts."""
        return cls(mx.zeros((0,), mx.int32), mx.zeros((0, 1), mx.int32), mx.zeros((0, 1)))

    @classmethod
    def certain(cls, tokens: mx.array) -> Drafts:
        """Drafts ``[m]`` that were not drawn but chosen: their distributions are one-hot."""
        return cls(tokens, tokens[:, None], mx.ones((tokens.size, 1)))

    def first(self, count: int) -> Drafts:
        """The first drafts."""
        if count >= len(self):
            return self
        host_ids = None if self.host_ids is None else self.host_ids[:count]
        return Drafts(self.tokens[:count], self.candidates[:count], self.probs[:count], host_ids)

    def ids(self) -> list[int]:
        """Draft ids on the host; a sync if they are not there yet."""
        if self.host_ids is not None:
            return self.host_ids
        return cast(list[int], self.tokens.tolist())

    def __len__(self) -> int:
        return self.tokens.size


class Drafter(Protocol):
    """Proposes draft tokens for one answer.

    In each step the planner picks one drafter's proposal and the loop verifies the first of its
    drafts.  In the same forward ``draft`` may propose the next ones from the rows that ``rows``
    names; after the step ``commit`` learns what was emitted.  A drafter that needs no rows keeps
    the defaults of ``rows`` and ``draft``.

    Attributes:
        source: name of the drafter in plans and statistics.
    """

    source: str

    @property
    def num_drafts(self) -> int:
        """Number of drafts proposed for the next step."""
        ...

    def first(self, count: int) -> Drafts:
        """The first of them."""
        ...

    def commit(self, layout: StepLayout, tokens: Sequence[int], drafts: Drafts) -> None:
        """Take note of a step.

        Args:
            layout: its rows.
            tokens: accepted drafts, then the bonus token.
            drafts: what ``draft`` returned in it, with ``host_ids``.
        """
        ...

    def rows(self, layout: StepLayout, num_accepted: mx.array) -> mx.array | None:
        """Indices of the rows ``[m]`` whose hidden states ``draft`` needs, on the device.

        Args:
            layout: rows of the step.
            num_accepted: accepted drafts, scalar.

        Returns:
            Indices counted from the last pending row, or None if nothing is to be drafted.
        """
        return None

    def draft(
        self, hidden: mx.array, logits: mx.array, previous: mx.array, *, key: mx.array
    ) -> Drafts:
        """Propose drafts within a step, on the device and without a change to the drafter.

        Args:
            hidden: final hidden states of the rows, ``[m, D]``.
            logits: the base model's logits for them, ``[m, V]``.
            previous: the bonus token, which the first draft follows, scalar.
            key: random key.
        """
        return Drafts.none()
