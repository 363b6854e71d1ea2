"""The protocol of what proposes draft tokens, and the drafts themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import mlx.core as mx

from mlx_mtp.model.layout import StepLayout
from mlx_mtp.planning.offer import Offer

Distribution = Callable[[mx.array], mx.array]
"""Turns logits ``[..., V]`` into the probabilities that tokens are drawn from."""


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Drafts that branch: several alternatives for a position, on the device.

    Parents come before their children.  The ``host_`` fields are the same on the host, once the
    sync of the step has brought them there.

    Attributes:
        tokens: draft ids, int32 ``[N]``.
        parents: the node that each draft follows, int32 ``[N]``; see ``StepLayout.parents``.
        probs: the drafter's probability of each draft where its parent is right, ``[N]``.
    """

    tokens: mx.array
    parents: mx.array
    probs: mx.array
    host_ids: list[int] | None = None
    host_parents: list[int] | None = None
    host_probs: list[float] | None = None

    def fetched(self, ids: Sequence[int]) -> DraftTree:
        """The same with ids and parents ``[2 N]`` on the host too, once all is evaluated."""
        count, probs = self.tokens.size, cast(list[float], self.probs.tolist())
        return replace(
            self, host_ids=list(ids[:count]), host_parents=list(ids[count:]), host_probs=probs
        )

    def chosen(self, nodes: Sequence[int]) -> Drafts:
        """Some of the drafts, counted from 1, for a layout with their parents."""
        rows = [node - 1 for node in nodes]
        ids = None if self.host_ids is None else [self.host_ids[row] for row in rows]
        drafts = Drafts.certain(self.tokens[mx.array(rows, mx.int32)])
        return replace(drafts, host_ids=ids)

    # The following need the host fields.

    def up_to(self, depth: int) -> DraftTree:
        """The nodes of the first depths, which come first."""
        assert self.host_ids is not None and self.host_parents is not None
        assert self.host_probs is not None
        depths = [0]
        for parent in self.host_parents:
            depths.append(depths[parent] + 1)
        end = sum(1 <= each <= depth for each in depths)
        return DraftTree(
            self.tokens[:end], self.parents[:end], self.probs[:end],
            self.host_ids[:end], self.host_parents[:end], self.host_probs[:end],
        )  # fmt: skip

    def likeliest_chain(self) -> list[int]:
        """Ids along the first children, if children of one parent are in order."""
        assert self.host_ids is not None and self.host_parents is not None
        last, ids = 0, list[int]()
        for node, parent in enumerate(self.host_parents, start=1):
            if parent == last:
                last = node
                ids.append(self.host_ids[node - 1])
        return ids

    def judged(self, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Probabilities of the nodes whose parents are among ``tokens``, and which were right.

        Args:
            tokens: the ids that followed.
        """
        assert self.host_ids is not None and self.host_parents is not None
        assert self.host_probs is not None
        path = {0: 0}  # depth of the nodes that were right
        probs, right = list[float](), list[bool]()
        columns = zip(self.host_ids, self.host_parents, self.host_probs, strict=True)
        for node, (token, parent, prob) in enumerate(columns, start=1):
            depth = path.get(parent, len(tokens))
            if depth < len(tokens):
                probs.append(prob)
                right.append(token == tokens[depth])
                if right[-1]:
                    path[node] = depth + 1
        return probs, right


@dataclass(frozen=True)
class Drafts:
    """Drafts to verify, on the device.

    Attributes:
        tokens: draft ids, int32 ``[m]``.
        candidates: ids that the draft distributions are over, ``[m, S]``.
        probs: the distributions that the drafts were drawn from, ``[m, S]``; one-hot when greedy.
        host_ids: ``tokens`` on the host, once a sync has brought them there.
        tree: drafts that may be verified in place of these; see ``Drafter.draft``.
    """

    tokens: mx.array
    candidates: mx.array
    probs: mx.array
    host_ids: list[int] | None = None
    tree: DraftTree | None = None

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
        """The first drafts, without the tree."""
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
        last_node: the last accepted draft, counted from 1, or 0; in a chain also their number.
        tokens: accepted drafts, then the bonus token, even if some of them were cut at the end of
            the answer; none of a prompt chunk.
        next_ids: the id that follows each ordinary row which stays in the cache, in order: the rest
            of the prompt, then the emitted ids.
        hidden: final hidden states of the pending rows and the accepted drafts, then perhaps of
            rejected ones, ``[rows, D]``, on the device; the first ``len(next_ids)`` are those of
            the rows that stay.
        drafts: what ``Drafter.draft`` returned in the step, with ``host_ids``.
    """

    layout: StepLayout
    source: str = ""
    last_node: int = 0
    tokens: Sequence[int] = ()
    next_ids: Sequence[int] = ()
    hidden: mx.array
    drafts: Drafts

    @property
    def num_accepted(self) -> int:
        """Number of accepted drafts."""
        return int(self.layout.depths[self.last_node])


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

    def propose_tree(self, nodes: Sequence[int]) -> Drafts:
        """Propose drafts that branch, in place of ``propose``.

        Args:
            nodes: which drafts of the offered tree, counted from 1 as in ``Plan.nodes``.
        """
        raise AssertionError(f"{self.source} offers no trees")

    def commit(self, step: CommittedStep) -> None:
        """Take note of a step: rewind what ``propose`` assumed, and learn."""
        ...

    def rows(self, layout: StepLayout, last_node: mx.array) -> mx.array | None:
        """Indices of the rows ``[m]`` whose hidden states ``draft`` needs, on the device.

        Args:
            layout: rows of the step.
            last_node: the last accepted draft, counted from 1, or 0; scalar.

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
