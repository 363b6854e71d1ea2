"""Adversarial trees of drafts, and requests that verify them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_mtp.decoding.outcome import StepResult
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.drafting.drafter import CommittedStep, Drafter, Drafts, DraftTree
from mlx_mtp.model.layout import StepLayout, subtree_parents
from mlx_mtp.planning.offer import Offer, OfferedTree
from mlx_mtp.planning.plan import Plan

Kind = Literal["random", "right", "wrong", "late"]
KINDS: tuple[Kind, ...] = ("random", "right", "wrong", "late")
SOURCE = "tree"
MAX_NODES = 9


def longest_right(parents: Sequence[int], ids: Sequence[int], rest: Sequence[int]) -> int:
    """Number of drafts on the longest path that the text goes on with."""
    depths = [0]  # of nodes on such a path, -1 elsewhere
    for token, parent in zip(ids, parents, strict=True):
        depth = depths[parent]
        depths.append(depth + 1 if 0 <= depth < len(rest) and rest[depth] == token else -1)
    return max(depths)


class TreeDrafter(Drafter):
    """Drafts random trees, by what the text goes on with.

    Args:
        text: prompt and answer.
        num_prompt: ids of the prompt.
        kind: "right" has a path on which all are right, "late" likewise, and it branches off after
            wrong siblings at every node; "wrong" has none; in "random" trees some are right, and
            siblings may be equal.
        rng: of the trees.
        vocab: number of ids.
    """

    source = SOURCE

    def __init__(
        self,
        text: Sequence[int],
        num_prompt: int,
        kind: Kind,
        *,
        rng: np.random.Generator,
        vocab: int,
    ) -> None:
        self.text, self.done, self.kind, self.rng, self.vocab = text, num_prompt, kind, rng, vocab
        self.steps: list[CommittedStep] = []
        self.expected: list[int] = []  # drafts that each step must accept
        self._parents: list[int] = []
        self._ids: list[int] = []
        self._chosen: tuple[int, ...] = ()

    @property
    def rest(self) -> list[int]:
        """What the text goes on with."""
        return list(self.text[self.done :])

    def offer(self, room: int) -> Offer:
        """A new tree."""
        self._parents, self._ids = self._grow()
        self._chosen = ()
        probs = self.rng.random(len(self._ids))
        return Offer(SOURCE, 0, tree=OfferedTree(np.array(self._parents), probs))

    def _grow(self) -> tuple[list[int], list[int]]:
        rng, rest = self.rng, self.rest
        count = int(rng.integers(1, MAX_NODES + 1))
        parents = [int(rng.integers(max(0, i - 2), i + 1)) for i in range(count)]
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents, 1):
            children.setdefault(parent, []).append(node)
        right = {0: 0}  # depths of right nodes
        ids = []
        for node, parent in enumerate(parents, 1):
            depth = right.get(parent, len(rest))
            token = int(rng.integers(self.vocab))
            if depth < len(rest):
                among = children[parent]
                is_right = {
                    "random": rng.random() < 0.5,
                    "right": node == among[depth % len(among)],
                    "wrong": False,
                    "late": node == among[-1],
                }[self.kind]
                others = 1 + token % (self.vocab - 1)
                if is_right:
                    token = rest[depth]
                elif self.kind != "random":
                    token = (rest[depth] + others) % self.vocab
                if token == rest[depth]:
                    right[node] = depth + 1
            ids.append(token)
        return parents, ids

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """Never asked for."""
        raise AssertionError

    def propose_tree(self, nodes: Sequence[int]) -> Drafts:
        """The nodes; now and then their ids are on the device only."""
        self._chosen = tuple(nodes)
        ids, parents = (mx.array(each, mx.int32) for each in (self._ids, self._parents))
        known = self._ids if self.rng.random() < 0.7 else None
        return DraftTree(ids, parents, mx.ones(len(self._ids)), host_ids=known).chosen(nodes)

    def commit(self, step: CommittedStep) -> None:
        """Note what was accepted, and what should have been."""
        if step.tokens:
            parents = subtree_parents(self._parents, self._chosen)
            ids = [self._ids[node - 1] for node in self._chosen]
            self.expected.append(longest_right(parents, ids, self.rest))
            self.steps.append(step)
            self.done += len(step.tokens)


class TreePlanner:
    """Plans any part of an offered tree, with masks after any of its nodes.

    Args:
        k: maximum number of masks of a group.
        rng: of the plans.
        keeps_to_room: whether no path is longer than what may still be emitted.
    """

    def __init__(self, k: int, rng: np.random.Generator, *, keeps_to_room: bool = True) -> None:
        self.k, self.rng, self.keeps_to_room = k, rng, keeps_to_room
        self.layouts: list[StepLayout] = []

    def plan(self, *, num_pending: int, room: int, offers: Sequence[Offer] = (), **_: Any) -> Plan:
        """Plan one step."""
        trees = [offer.tree for offer in offers if offer.tree is not None]
        parents, depths, nodes = trees[0].parents.tolist(), {0: 0}, []
        for node, parent in enumerate(parents, 1):
            if parent not in depths or self.rng.random() < 0.1:
                continue
            if self.keeps_to_room and depths[parent] >= room - 1:
                continue
            depths[node] = depths[parent] + 1
            nodes.append(node)
        counts = self.rng.integers(0, self.k + 1, len(nodes) + 1)
        if self.rng.random() < 0.3:
            counts[:] = 0
        layout = StepLayout(
            num_pending, len(nodes), tuple(counts.tolist()), subtree_parents(parents, nodes)
        )
        self.layouts.append(layout)
        return Plan(layout, source=SOURCE if nodes else "", nodes=tuple(nodes) or None)

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


def tree_request(
    model: Any,
    prompt: Sequence[int],
    text: Sequence[int],
    kind: Kind,
    *,
    keeps_to_room: bool = True,
    tree_seed: int = 0,
    **options: Any,
) -> tuple[Request, TreeDrafter, TreePlanner]:
    """A request that verifies trees.

    Args:
        model: the model.
        prompt: of the request.
        text: all ids of prompt and answer, cached ones included, which the trees are about.
        kind: of the trees.
        keeps_to_room: see ``TreePlanner``.
        tree_seed: of the trees and plans.
        options: of ``make_request``.
    """
    request = make_request(model, prompt, layout="linear", **options)
    rng = np.random.default_rng(tree_seed)
    vocab = model.vocab_size
    drafter = TreeDrafter(text, len(request.ids), kind, rng=rng, vocab=vocab)
    planner = TreePlanner(model.num_draft_tokens, rng, keeps_to_room=keeps_to_room)
    request.planner = planner
    request.drafters = [drafter, *request.drafters]
    return request, drafter, planner


def finish(model: Any, request: Request) -> list[StepResult]:
    """Run a request to its end; the steps that emitted."""
    steps = []
    while not request.finished:
        result = request.commit(run(model, [request.plan()])[0])
        if result.tokens:
            steps.append(result)
    return steps


def ids_of(steps: Sequence[StepResult]) -> list[int]:
    """The emitted ids."""
    return [token for step in steps for token in step.tokens]
