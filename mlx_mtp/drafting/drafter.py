"""The protocol of what proposes draft tokens, and the drafts themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import mlx.core as mx

from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.offer import Offer

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
        return cls(mx.zeros((0,), mx.int32), mx.zeros((0, 1), mx.int32), mx.zeros((0, 1)), [])

    @classmethod
    def certain(cls, tokens: mx.array) -> Drafts:
        """Drafts ``[m]`` that were not drawn but chosen: their distributions are one-hot."""
        return cls(tokens, tokens[:, None], mx.ones((tokens.size, 1)))

    @classmethod
    def joined(cls, parts: Sequence[Drafts]) -> Drafts:
        """Drafts one after the other; shorter lists of candidates repeat the draft at no weight."""
        if len(parts) == 1:
            return parts[0]
        size = max(part.candidates.shape[1] for part in parts)
        tokens, candidates, probs = [], [], []
        for part in parts:
            missing = size - part.candidates.shape[1]
            filler = mx.broadcast_to(part.tokens[:, None], (len(part), missing))
            tokens.append(part.tokens)
            candidates.append(mx.concatenate([part.candidates, filler], axis=1))
            probs.append(mx.pad(part.probs, [(0, 0), (0, missing)]))
        return cls(mx.concatenate(tokens), mx.concatenate(candidates), mx.concatenate(probs))

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


@dataclass(frozen=True, eq=False, kw_only=True)
class CommittedStep:
    """A step that ran, as drafters see it.

    Attributes:
        layout: its rows.
        source: name of the drafter whose drafts it verified; "" without any.
        num_accepted: accepted drafts.
        tokens: accepted drafts, then the bonus token, even if some of them were cut at the end of
            the answer; none of a prompt chunk.
        next_ids: the id that follows each ordinary row which stays in the cache, in order: the rest
            of the prompt, then the emitted ids.
        hidden: final hidden states of the ordinary rows, ``[num_ordinary, D]``, on the device; the
            first ``len(next_ids)`` are those of the rows that stay.
        drafts: what ``Drafter.draft`` returned in the step, with ``host_ids``.
    """

    layout: StepLayout
    source: str = ""
    num_accepted: int = 0
    tokens: Sequence[int] = ()
    next_ids: Sequence[int] = ()
    hidden: mx.array
    drafts: Drafts


class Drafter(Protocol):
    """Proposes draft tokens for one answer.

    Before each step every drafter makes an ``offer``; the planner picks one of them, and that
    drafter proposes the drafts that the step verifies.  Proposing may run forwards of a module or
    of another model, which are not waited for: the drafts stay on the device and become rows of the
    step.  After each step, prompt chunks included, every drafter takes note of it in ``commit``.

    A drafter that needs rows of its own in the step (mask tokens) implements ``rows`` and ``draft``
    and proposes later what ``draft`` returned; others inherit the defaults.

    Attributes:
        source: name of the drafter in plans and statistics.
    """

    source: str

    def offer(self, room: int) -> Offer:
        """What could be proposed for the next step; on the host, without work for the device.

        Args:
            room: number of tokens that may still be emitted; later drafts are useless.
        """
        ...

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """Propose the drafts of the next step, without waiting for the device.

        Args:
            count: how many, at most as many as were offered.
            key: random key.
        """
        ...

    def commit(self, step: CommittedStep) -> None:
        """Take note of a step: rewind what ``propose`` assumed, and learn."""
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
            logits: the base model's logits for them, ``[m, V]``, or those of the tokens of
                ``model.frequent``, ``[m, F]``.
            previous: the bonus token, which the first draft follows, scalar.
            key: random key.
        """
        return Drafts.none()


class NoDrafter(Drafter):
    """Proposes nothing."""

    source = ""

    def offer(self, room: int) -> Offer:
        """No drafts."""
        return Offer("", 0)

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """No drafts."""
        return Drafts.none()

    def commit(self, step: CommittedStep) -> None:
        """Take note of nothing."""
