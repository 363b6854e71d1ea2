"""Steps of a greedy decode with layout ``tree``, counted on existing texts.

As in ``acceptance``, the text determines what is accepted.  Which masks a step has depends on the
steps before, but what they predict does not: one forward computes the masks after every token of
the answer, and the planner and the drafter of decoding then take the steps one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_mtp.drafting.drafter import CommittedStep, Drafts
from mlx_mtp.drafting.lookup import LookupDrafter
from mlx_mtp.drafting.mask_trees import MaskTreeDrafter
from mlx_mtp.drafting.suffix_lookup import SuffixLookup
from mlx_mtp.evaluation.acceptance import checked_num_masks
from mlx_mtp.evaluation.forward import draft_states, ordinary_rows
from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.plan import TREE, Plan
from mlx_mtp.planning.planner import make_planner
from mlx_mtp.planning.policy import best_policy
from mlx_mtp.planning.tree import nearest_masks

_NO_HIDDEN = mx.zeros((0, 0))


class MaskStates:
    """Hidden states of the masks after each token of an answer.

    Args:
        model: with its adapter.
        ids: prompt and answer.
        first: position of the answer's first token, at least 1.
        rows_per_forward: maximum mask rows per forward.
    """

    def __init__(
        self, model: MTPModel, ids: Sequence[int], *, first: int, rows_per_forward: int = 512
    ) -> None:
        self.model, self.ids, self.first = model, list(ids), first
        self.k = checked_num_masks(model, None)
        anchors = range(first - 1, len(ids) - 2)
        ordinary = ordinary_rows(model, mx.array(self.ids[:-1]))
        size, parts = max(rows_per_forward // self.k, 1), []
        for start in range(0, len(anchors), size):
            part = tuple(anchors[start : start + size])
            parts.append(draft_states(model, ordinary, MaskRows(part, self.k)))
            mx.eval(parts[-1])
        shape = (len(anchors), self.k, -1)
        self._states = mx.concatenate(parts).reshape(shape) if parts else _NO_HIDDEN

    def draft(
        self, drafter: MaskTreeDrafter, position: int, masks: Sequence[tuple[int, int]]
    ) -> Drafts:
        """What a drafter makes of masks.

        Args:
            drafter: the drafter.
            position: of the bonus token.
            masks: the position of the token before each mask, and which mask it is.
        """
        if not masks or position >= len(self.ids) - 1:
            return Drafts.none()
        places, offsets = (mx.array(column) for column in zip(*masks, strict=True))
        hidden = self._states[places - (self.first - 1), offsets]
        logits = self.model.logits(hidden[None])[0]
        bonus = mx.array(self.ids[position])
        drafts = drafter.draft(hidden, logits, bonus, key=mx.random.key(0))
        assert drafts.tree is not None
        mx.eval(drafts.tree.tokens, drafts.tree.parents, drafts.tree.probs)
        numbers = mx.concatenate([drafts.tree.tokens, drafts.tree.parents])
        return replace(drafts, tree=drafts.tree.fetched(cast(list[int], numbers.tolist())))


def tree_steps(
    states: MaskStates, known: Speculation, *, max_rows: int, lookup: bool = False
) -> int:
    """Count the steps of an answer, its prompt's included.

    Args:
        states: of the answer.
        known: acceptance, which keeps learning.
        max_rows: maximum rows of a step.
        lookup: whether looked-up ids are merged into the trees.
    """
    ids, end = states.ids, len(states.ids)
    planner = make_planner(TREE, num_draft_tokens=states.k, speculation=known, max_rows=max_rows)
    drafter = MaskTreeDrafter(states.model, None, known, ids[: states.first])
    if lookup:
        drafter.lookup = LookupDrafter(SuffixLookup(ids[: states.first]), known.lookup)
    position, num_steps, num_pending = states.first - 1, 0, states.first
    while position < end - 1:
        room = end - 1 - position
        offers = [drafter.offer(room - 1)]
        plan = planner.plan(num_pending=num_pending, room=room, offers=offers, context=position)
        path = _accepted(plan, drafter, ids[position + 1 :])
        tokens = ids[position + 1 : position + len(path) + 1]
        layout = plan.layout
        parents = range(layout.num_draft_tokens) if layout.parents is None else layout.parents
        nearest = nearest_masks(parents, layout.mask_counts)[path[-1]]
        depths = layout.depths.tolist()
        masks = [(position + depths[node], index) for node, index in nearest]
        position, num_steps, num_pending = position + len(tokens), num_steps + 1, 1
        step = CommittedStep(
            layout=layout, source=plan.source, last_node=path[-1], tokens=tokens, next_ids=tokens,
            hidden=_NO_HIDDEN, drafts=states.draft(drafter, position, masks),
        )  # fmt: skip
        planner.observe(plan, last_node=path[-1], context=position, ms=np.nan)
        drafter.commit(step)
        if drafter.lookup is not None:
            drafter.lookup.commit(step)
    return num_steps


def _accepted(plan: Plan, drafter: MaskTreeDrafter, following: Sequence[int]) -> list[int]:
    """The nodes of a step that a text accepts, after node 0; the last id is never a draft."""
    count = plan.layout.num_draft_tokens
    if not count:
        return [0]
    if plan.nodes is None:
        drafts = drafter.propose(count, key=mx.random.key(0))
    else:
        drafts = drafter.propose_tree(plan.nodes)
    parents = range(count) if plan.layout.parents is None else plan.layout.parents
    path = [0]
    for node, (token, parent) in enumerate(zip(drafts.ids(), parents, strict=True), start=1):
        depth = len(path)
        if parent == path[-1] and depth < len(following) and token == following[depth - 1]:
            path.append(node)
    return path


def best_chain_steps(
    counts: np.ndarray, prefix_probs: np.ndarray, *, max_rows: int, num_waiting: int
) -> int:
    """Count the steps of the best layouts without branches, the prompt's included.

    Args:
        counts: accepted drafts after each anchor but the last (``acceptance.accepted_counts``).
        prefix_probs: probability that at least j drafts are accepted, ``[k + 1]``.
        max_rows: maximum rows of a step.
        num_waiting: drafts that the prompt's step makes.
    """
    k = len(prefix_probs) - 1
    policy = best_policy(prefix_probs, np.ones(max_rows + 1), np.zeros(k + 1))
    position, num_steps, waiting = 0, 1, num_waiting
    while position < len(counts):
        action = policy.actions[waiting]
        accepted = min(int(counts[position]), action.num_draft_tokens)
        waiting = action.mask_counts[accepted]
        position, num_steps = position + 1 + accepted, num_steps + 1
    return num_steps
