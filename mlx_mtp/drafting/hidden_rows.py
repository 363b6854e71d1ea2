"""Drafters that continue from the final hidden states of the model's ordinary rows.

A module with caches of its own reads, for each ordinary row that stays in the model's cache, the
row's final hidden state and the id that follows it.  Rows are collected and read together when
drafts are proposed, or when many have come together, as in a prompt.  Rows that ``propose`` appends
to the module's caches on the assumption that its drafts are accepted are dropped in ``commit``.

What a module has read is remembered with the model's cache from one answer to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.drafting.drafter import CommittedStep, Drafter, Drafts
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.model.parts import module_at
from mlx_mtp.planning.offer import Offer

MAX_UNREAD = 256  # rows that wait to be read; more are read without being needed for a draft


@dataclass
class ModuleRows:
    """What a module has read of a text.

    The row at which the text went on in another way keeps the id that followed it before: its
    hidden state, which would be needed to read it again, is gone.  There modules that are further
    behind than the text was rewound lack rows.

    Attributes:
        cache: the module's caches.
        start: number of rows of the model's cache before the first one that was read.
        end: number of rows of the model's cache that were read or wait to be.
        counts: rows that were read, by layer of the module; more are drafts'.
        hidden: final hidden states of the rows that wait, ``[rows, D]`` each.
        next_ids: the ids that follow them.
        last: the module's output for the last row that was read; None before the first.
    """

    cache: MTPCache
    start: int
    end: int
    counts: list[int]
    hidden: list[mx.array] = field(default_factory=list)
    next_ids: list[int] = field(default_factory=list)
    last: Any = None

    @classmethod
    def begin(cls, cache: MTPCache, end: int) -> ModuleRows:
        """Nothing of a text that has ``end`` rows."""
        return cls(cache, end, end, [0] * len(cache.layers))

    def rewind_to(self, end: int) -> bool:
        """Forget the rows from ``end`` on.

        Returns:
            Whether that was possible; the memory is of no use otherwise.
        """
        num_waiting = len(self.next_ids) - (self.end - end)
        if not self.start <= end <= self.end:
            return False
        if num_waiting < 0:
            counts = [min(count, end - self.start) for count in self.counts]
            if not self._drop_to(counts):
                return False
            self.counts, self.last = counts, None
        waiting = max(num_waiting, 0)
        self.hidden = [mx.concatenate(self.hidden)[:waiting]] if waiting else []
        self.next_ids, self.end = self.next_ids[:waiting], end
        return True

    def drop_drafts(self) -> None:
        """Drop the rows of drafts."""
        assert self._drop_to(self.counts), "a window had dropped rows that were needed"

    def _drop_to(self, counts: list[int]) -> bool:
        """Drop rows until there are these numbers of them, if that is possible."""
        pairs = list(zip(self.cache.layers, counts, strict=True))
        if not all(layer.can_rewind(layer.offset - count) for layer, count in pairs):
            return False
        for layer, count in pairs:
            layer.rewind(layer.offset - count)
        return True


class HiddenRowsDrafter(Drafter):
    """Base of drafters with a module that reads hidden states.

    A subclass implements ``_read``, which appends rows to the module's caches, and ``_draft``,
    which proposes drafts from the module's output for the last row.

    Args:
        source: name of the drafter.
        cache: the model's caches, which carry what the module remembers.
        make_cache: makes the module's caches.
        max_drafts: maximum drafts of a step.
        first_cost, next_cost: estimated cost of the first draft and of each further one, in plain
            steps.
    """

    def __init__(
        self,
        source: str,
        cache: MTPCache,
        make_cache: Any,
        *,
        max_drafts: int,
        first_cost: float,
        next_cost: float,
    ) -> None:
        self.source = source
        self._max_drafts = max_drafts
        self._costs = first_cost, next_cost
        rows = cache.drafter_memory.get(source)
        if rows is None or not rows.rewind_to(cache.offset):
            rows = cache.drafter_memory[source] = ModuleRows.begin(make_cache(), cache.offset)
        self._rows: ModuleRows = rows

    def offer(self, room: int) -> Offer:
        """Drafts after the last row, once there is one."""
        has_rows = bool(self._rows.next_ids) or self._rows.last is not None
        first_cost, next_cost = self._costs
        count = min(self._max_drafts, room) if has_rows else 0
        return Offer(self.source, count, first_cost=first_cost, next_cost=next_cost)

    def propose(self, count: int, *, key: mx.array) -> Drafts:
        """Read the rows that wait, then draft."""
        self._rows.drop_drafts()  # of a step that was planned before and not run
        self._read_rows()
        return self._draft(self._rows.last, count, key=key)

    def commit(self, step: CommittedStep) -> None:
        """Drop assumed rows and take up those that stay."""
        rows, count = self._rows, len(step.next_ids)
        rows.drop_drafts()
        rows.hidden.append(step.hidden[:count])
        rows.next_ids += step.next_ids
        rows.end += count
        if len(rows.next_ids) >= MAX_UNREAD or not step.tokens:
            self._read_rows()
            mx.eval(rows.cache.state, rows.last)

    def _read_rows(self) -> None:
        """Let the module read the rows that wait."""
        rows = self._rows
        if not rows.next_ids:
            return
        hidden, ids = mx.concatenate(rows.hidden), mx.array(rows.next_ids, mx.int32)
        rows.cache.begin_step()
        rows.last = self._read(hidden[None], ids[None])
        rows.hidden, rows.next_ids = [], []
        rows.counts = [layer.offset for layer in rows.cache.layers]

    def _read(self, hidden: mx.array, next_ids: mx.array) -> Any:
        """Append rows to the module's caches.

        Args:
            hidden: final hidden states, ``[1, L, D]``.
            next_ids: the ids that follow the rows, ``[1, L]``.

        Returns:
            The module's output for the last row, which ``_draft`` gets.
        """
        raise NotImplementedError

    def _draft(self, last: Any, count: int, *, key: mx.array) -> Drafts:
        """Draft after the last row; may append ``count - 1`` rows to the module's caches."""
        raise NotImplementedError


def relative_cost(model: MTPModel, module: Any) -> float:
    """Estimated cost of one row of a module and of the model's head, in plain steps, by bytes."""
    head = module_at(model.base, model.parts.head or model.parts.embedding)
    return (_nbytes(module) + _nbytes(head)) / max(_nbytes(model.base), 1)


def _nbytes(module: Any) -> int:
    if isinstance(module, mx.array):
        return module.nbytes
    arrays: Any = tree_flatten(module.parameters())
    return sum(value.nbytes for _, value in arrays)
