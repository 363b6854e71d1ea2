"""Drafts from mask tokens that branch: a beam in place of the greedy chain.

The tree is made on the device within the step and comes to the host in the step's sync.  What was
emitted then judges its nodes, verified or not: the children of every node on the path, and those
of the last one by the bonus token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlx_mtp.drafting.beam import draft_beam
from mlx_mtp.drafting.drafter import CommittedStep, Distribution, Drafts, DraftTree
from mlx_mtp.drafting.lookup import LookupDrafter
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.drafting.shortlist import SHORTLIST
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.offer import Offer, OfferedTree
from mlx_mtp.planning.plan import CHAIN, MASK
from mlx_mtp.planning.tree import nearest_masks

WIDTH = 4  # nodes of each depth


class MaskTreeDrafter(MaskTokenDrafter):
    """Proposes trees of the tokens that the mask rows of the last step predicted.

    What followed the text's last ids before is a path in the tree, merged with the nodes that it
    shares.  After an accepted draft without masks of its own, those before it serve
    (``nearest_masks``).

    Args:
        model: the model with its adapter.
        distribution: as in ``MaskTokenDrafter``; a tree has the likeliest tokens, drawn or not.
        known: acceptance of nodes and of chains, which keeps learning.
        ids: the conversation so far.

    Attributes:
        lookup: looks the path up; None looks nothing up.
    """

    def __init__(
        self,
        model: MTPModel,
        distribution: Distribution | None,
        known: Speculation,
        ids: Sequence[int] = (),
    ) -> None:
        super().__init__(model, distribution, ids)
        self._known = known
        self._tree: DraftTree | None = None
        self._proposed_chain = False
        self._ids = list[int]()  # of the offered nodes
        self.lookup: LookupDrafter | None = None

    def offer(self, room: int) -> Offer:
        """The likeliest chain, and the tree with the looked-up path."""
        if self._tree is None:
            return Offer(MASK, 0)
        ids, parents = self._tree.host_ids, self._tree.host_parents
        assert ids is not None and parents is not None
        probs = self._known.tree.probs(np.array(self._tree.host_probs)).tolist()
        self._ids, parents = list(ids), list(parents)
        if self.lookup is not None:
            match = self.lookup.match
            reach = self.lookup.prefix_probs(match, min(len(match.tokens), room))
            add_path(self._ids, parents, probs, match.tokens, (reach[1:] / reach[:-1]).tolist())
        return Offer(MASK, len(self._drafts), tree=OfferedTree(np.array(parents), np.array(probs)))

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """The first drafts of the likeliest chain."""
        self._proposed_chain = True
        return super().propose(count, key=key)

    def propose_tree(self, nodes: Sequence[int]) -> Drafts:
        """Nodes of the tree made in the last step."""
        ids = [self._ids[node - 1] for node in nodes]
        return replace(Drafts.certain(mx.array(ids, mx.int32)), host_ids=ids)

    def commit(self, step: CommittedStep) -> None:
        """Learn from the emitted ids, and keep the new tree as far as masks reached."""
        self._take_up(step.next_ids)
        if self._tree is not None and step.tokens:
            # The planner counts chains that were verified.
            if not self._proposed_chain and step.source != CHAIN:
                self._count_chain(step.tokens)
            probs, right = self._tree.judged(step.tokens)
            self._known.tree.observe(np.array(probs), np.array(right))
        self._proposed_chain = False
        depth = len(_draft_rows(step.layout)[step.last_node])
        tree = step.drafts.tree
        self._tree = tree.up_to(depth) if tree is not None and depth else None
        self._drafts = Drafts.none()
        if self._tree is not None:
            chain = self._tree.likeliest_chain()
            self._drafts = replace(Drafts.certain(mx.array(chain, mx.int32)), host_ids=chain)

    def _count_chain(self, tokens: Sequence[int]) -> None:
        """Learn how many drafts of the likeliest chain were right, verified or not."""
        chain = self._drafts.ids()[: len(tokens)]
        pairs = zip(chain, tokens, strict=False)
        num_right = next((i for i, (a, b) in enumerate(pairs) if a != b), len(chain))
        self._known.acceptance.observe(len(chain), num_right)

    def rows(self, layout: StepLayout, last_node: mx.array) -> mx.array | None:
        """For each draft after the last accepted one, the nearest mask row that predicts it."""
        if layout.num_masks == 0:
            return None
        return _draft_index(layout)[last_node]

    def draft(
        self, hidden: mx.array, logits: mx.array, previous: mx.array, *, key: mx.array
    ) -> Drafts:
        """Draft a tree; the chain in it is known after the sync only."""
        candidates, scores = self._rate(hidden, logits).shortlist(SHORTLIST)
        beam = draft_beam(self._model, hidden, scores, candidates, previous, width=WIDTH)
        return replace(Drafts.none(), tree=DraftTree(*beam))


def add_path(
    ids: list[int],
    parents: list[int],
    probs: list[float],
    path: Sequence[int],
    path_probs: Sequence[float],
) -> None:
    """Add a path of ids to the nodes of a tree, which are changed in place.

    A node that is there already gets the higher of both probabilities, and its siblings share what
    that leaves.

    Args:
        ids: of the nodes, ``[N]``.
        parents: what each node follows, counted from 1; 0 is the root.
        probs: probability of each node if its parent is accepted.
        path: ids that may follow the root, ``[n]``.
        path_probs: probability of each if those before it are accepted.
    """
    last = 0
    for token, prob in zip(path, path_probs, strict=False):
        siblings = [node for node, parent in enumerate(parents, start=1) if parent == last]
        node = next((each for each in siblings if ids[each - 1] == token), None)
        before = 0.0
        if node is None:
            ids.append(token)
            parents.append(last)
            probs.append(0.0)
            node = len(ids)
        else:
            before = probs[node - 1]
        if prob > before:
            for sibling in siblings:
                probs[sibling - 1] *= (1 - prob) / (1 - before)
            probs[node - 1] = prob
        last = node


@lru_cache(maxsize=256)
def _draft_rows(layout: StepLayout) -> list[list[int]]:
    """Rows that predict the drafts after each node, counted from the last pending row."""
    starts = 1 + layout.num_draft_tokens + np.cumsum((0, *layout.mask_counts[:-1]))
    parents = range(layout.num_draft_tokens) if layout.parents is None else layout.parents
    nearest = nearest_masks(parents, layout.mask_counts)
    return [[int(starts[node]) + index for node, index in line] for line in nearest]


@lru_cache(maxsize=256)
def _draft_index(layout: StepLayout) -> mx.array:
    """The same on the device, ``[1 + drafts, longest]``; others repeat their last row."""
    lines = _draft_rows(layout)
    longest, filler = max(map(len, lines)), layout.num_rows - layout.num_pending
    filled = [line + (line[-1:] or [filler]) * (longest - len(line)) for line in lines]
    return mx.array(filled, mx.int32)
