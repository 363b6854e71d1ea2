"""Models whose drafts, or whose whole distribution, are written down beforehand.

They keep to what the loop asks of an ``MTPModel``: a forward over a layout, ``logits``, ``embed``,
``unembed_rows``, ``make_cache`` and a few properties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.model.layout import StepLayout, plain_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import Plan

Script = Callable[[int, int], int]
"""What a mask row drafts: (position of the drafted token, which mask of its group) to an id."""
CERTAIN = 1e4


class ScriptedModel:
    """A real model whose mask rows draft what a script says; ordinary rows keep their bits."""

    sampler_head = None

    def __init__(self, model: MTPModel, script: Script) -> None:
        self.model = model
        self.script = script
        self.forwards = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, ids: mx.array, *, cache: Any, layout: StepLayout | None = None) -> mx.array:
        """Hidden states with one more column for each token, ``[1, L, D + V]``."""
        self.forwards += 1
        offset = cache.offset
        hidden = self.model(ids, cache=cache, layout=layout)
        columns = np.zeros((1, ids.shape[1], self.model.vocab_size), np.float32)
        if layout is not None and layout.num_masks:
            positions = offset + np.array(layout.positions)
            for mask, which in enumerate(layout.mask_offsets.tolist()):
                row = layout.gate_split + mask
                token = self.script(int(positions[row]) + 1, which)
                columns[0, row, token % self.model.vocab_size] = CERTAIN
        return mx.concatenate([hidden, mx.array(columns, hidden.dtype)], axis=-1)

    def logits(self, hidden: mx.array) -> mx.array:
        """``[B, L, V]``; adding zeros leaves an ordinary row's logits as they are."""
        dims = self.model.hidden_size
        return self.model.logits(hidden[..., :dims]) + hidden[..., dims:]


def right(sequence: Sequence[int]) -> Script:
    """Drafts what the sequence goes on with."""
    return lambda position, _: sequence[position] if position < len(sequence) else 0


def wrong(sequence: Sequence[int]) -> Script:
    """Never drafts what the sequence goes on with."""
    return lambda position, _: right(sequence)(position, 0) + 1 + position % 5


def mixed(sequence: Sequence[int], *, seed: int, share: float = 0.6) -> Script:
    """Drafts what the sequence goes on with, some of the time."""
    rng = np.random.default_rng(seed)

    def script(position: int, which: int) -> int:
        is_right = rng.random() < share
        return (right if is_right else wrong)(sequence)(position, which)

    return script


def one_wrong(sequence: Sequence[int], *, which_is_wrong: int) -> Script:
    """One mask of every group drafts a wrong token; those before and behind it are right."""

    def script(position: int, which: int) -> int:
        return (wrong if which == which_is_wrong else right)(sequence)(position, which)

    return script


class UnevenPlanner:
    """Plans groups of random sizes, empty ones too."""

    def __init__(self, num_draft_tokens: int, *, seed: int = 0) -> None:
        self.k = num_draft_tokens
        self.rng = np.random.default_rng(seed)
        self.plans: list[StepLayout] = []

    def plan(self, *, num_pending: int, room: int, offers: Any = (), **_: Any) -> Plan:
        """A layout with up to k masks in each group."""
        waiting = sum(offer.num_drafts for offer in offers if offer.source == "mask")
        drafts = min(waiting, self.k, room - 1)
        counts = tuple(self.rng.integers(0, self.k + 1, drafts + 1).tolist())
        self.plans.append(StepLayout(num_pending, drafts, counts))
        return Plan(self.plans[-1], source="mask" if drafts else "")

    def observe(self, plan: Plan, **_: Any) -> None:
        """Learn nothing."""


class TableCache:
    """Counts rows."""

    rows_until_change = None
    drops_rows = False
    supports_trees = False

    def __init__(self) -> None:
        self.offset = 0
        self.state: list[Any] = []
        self.drafter_memory: dict[str, Any] = {}

    def begin_step(self, num_prompt_left: int = 0) -> None:
        """Nothing to forget."""

    begin_answer = begin_step

    def rest_after_chunk(self, num_left: int, limit: int) -> int:
        """Chunks are as long as they may be."""
        return max(num_left - limit, 0)

    def keep_rows(self, rows: Sequence[int], *, of: int) -> None:
        """Keep some of the last rows."""
        self.rewind(of - len(rows))

    def rewind(self, num_rows: int) -> None:
        """Forget the last rows."""
        assert 0 <= num_rows <= self.offset
        self.offset -= num_rows


class TableModel:
    """A Markov chain that repeats every few tokens: the logits behind a token are a table's.

    Args:
        logits_table: ``[P, V, V]``; the logits of the token at position n (phase n mod P) behind
            the token before it.
        draft_table: ``[P, V]``; what a mask row knows of the token at its position.
        head_table: ``[V, V]``; what the sampler head adds for the draft before.
    """

    config = native = draft_model = frequent = None
    heads: Any = None
    max_context = None

    def __init__(
        self, logits_table: np.ndarray, draft_table: np.ndarray, head_table: np.ndarray
    ) -> None:
        self.logits_table = logits_table
        self.draft_table = draft_table
        self.head_table = mx.array(head_table)
        self.vocab_size = logits_table.shape[-1]
        self.num_draft_tokens = 8

    def __call__(
        self, ids: mx.array, *, cache: TableCache, layout: StepLayout | None = None
    ) -> mx.array:
        """Hidden states are the logits, ``[1, L, V]``."""
        layout = layout or plain_layout(num_pending=ids.shape[1])
        split = layout.gate_split
        phases = (cache.offset + np.array(layout.positions) + 1) % len(self.logits_table)
        cache.offset += layout.num_rows
        ordinary = self.logits_table[phases[:split], np.array(ids)[0, :split]]
        rows = np.concatenate([ordinary, self.draft_table[phases[split:]]])
        return mx.array(rows[None].astype(np.float32))

    def sampler_head(self, previous: mx.array, hidden: mx.array) -> mx.array:
        """Embeddings are one-hot, so this looks up the row of the draft before."""
        return hidden + previous @ self.head_table

    def logits(self, hidden: mx.array) -> mx.array:
        """They already are."""
        return hidden

    def embed(self, ids: mx.array) -> mx.array:
        """One-hot rows."""
        return mx.eye(self.vocab_size)[ids]

    unembed_rows = embed

    def make_cache(self) -> TableCache:
        """A fresh cache."""
        return TableCache()
