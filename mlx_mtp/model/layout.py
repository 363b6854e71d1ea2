"""StepLayout: the rows of one forward, their positions, and which rows they may see.

Ordinary rows come first: the pending tokens (one in the loop, a prompt chunk in prefill), then the
drafts to verify.  Mask groups follow, one per position where the accepted prefix may end.  Position
ids and the attention mask define what a row is, so any order would do; this one makes rewinding a
plain trim, the LoRA gate a single split index and every mask group contiguous.

                     position   sees
    x_0  d_1  d_2    0 1 2      ordinary rows up to itself
    m_1  m_2         1 2        x_0            and its own group so far
    m_1  m_2         2 3        x_0 d_1        and its own group so far
    m_1  m_2         3 4        x_0 d_1 d_2    and its own group so far

Drafts may branch.  Node 0 is the last pending row, node j is draft j, and each draft follows an
earlier node, its parent.  A row sees its ancestors in place of all rows before it, and its position
counts them.  A chain is the tree in which every node follows the one before.

                     position   sees
    x_0  d_1  d_2    0 1 1      d_1 and d_2 both follow x_0 and do not see each other
    d_3              2          x_0 d_2 d_3: it follows d_2
    m_1              3          x_0 d_2 d_3    a mask after node 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from mlx_mtp.model.recurrence import MixerCall


@dataclass(frozen=True)
class StepLayout:
    """Rows of one step.

    Attributes:
        num_pending: ordinary rows before the first draft, at least 1.
        num_draft_tokens: drafts to verify in this step.
        mask_counts: masks after the last pending row and after each draft, ``[1 + drafts]``.
        parents: the node that each draft follows, ``[drafts]``: 0 is the last pending row, j is
            draft j, and a parent comes before its children.  None for a chain, in which each draft
            follows the one before; a chain that is spelled out becomes None.
    """

    num_pending: int
    num_draft_tokens: int
    mask_counts: tuple[int, ...]
    parents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.parents is not None:
            _check_parents(self.parents, self.num_draft_tokens)
            is_chain = self.parents == tuple(range(self.num_draft_tokens))
            object.__setattr__(self, "parents", None if is_chain else tuple(self.parents))
        if self.num_pending < 1 or self.num_draft_tokens < 0:
            raise ValueError(f"a step needs a pending row: {self}")
        if len(self.mask_counts) != self.num_draft_tokens + 1 or min(self.mask_counts) < 0:
            raise ValueError(f"a step needs one mask count per draft and one more: {self}")

    @property
    def num_ordinary(self) -> int:
        """Ordinary rows, pending and drafts together."""
        return self.num_pending + self.num_draft_tokens

    @property
    def gate_split(self) -> int:
        """Index of the first mask row; equals the number of ordinary rows."""
        return self.num_ordinary

    @property
    def num_masks(self) -> int:
        """Mask rows of all groups together."""
        return sum(self.mask_counts)

    @property
    def num_rows(self) -> int:
        """All rows of the forward."""
        return self.num_ordinary + self.num_masks

    @property
    def is_contiguous(self) -> bool:
        """Whether every row follows the row before, as also masks after the last row do."""
        return not (self.is_tree or any(self.mask_counts[:-1]))

    @property
    def is_tree(self) -> bool:
        """Whether drafts branch."""
        return self.parents is not None

    @cached_property
    def node_parents(self) -> np.ndarray:
        """Parent of each draft, of a chain too, ``[drafts]``."""
        return np.array(range(self.num_draft_tokens) if self.parents is None else self.parents, int)

    @cached_property
    def ancestry(self) -> np.ndarray:
        """Whether a node is or descends from another, bool ``[1 + drafts, 1 + drafts]``.

        Row i has True for i itself and for the nodes on the way to it, node 0 included.
        """
        return tree_ancestry(self.node_parents.tolist())

    @cached_property
    def depths(self) -> np.ndarray:
        """Number of drafts up to each node, itself included, ``[1 + drafts]``."""
        return self.ancestry.sum(axis=1) - 1

    def path(self, node: int) -> tuple[int, ...]:
        """The drafts from the first to ``node``, which ends the path; empty for node 0."""
        if self.parents is None:
            return tuple(range(1, node + 1))
        return tuple(map(int, np.flatnonzero(self.ancestry[node])[1:]))

    def rows_to(self, node: int) -> list[int]:
        """Row indices of the pending rows and of the drafts on the path to ``node``."""
        first = self.num_pending - 1
        return [*range(self.num_pending), *(first + each for each in self.path(node))]

    @property
    def is_prompt_chunk(self) -> bool:
        """Whether there are several rows, all pending; layers may compute them in another form."""
        return self.num_rows == self.num_pending > 1

    @cached_property
    def mask_offsets(self) -> np.ndarray:
        """Which mask token each mask row is, counted from 0, int32 ``[num_masks]``."""
        return np.concatenate([np.arange(count, dtype=np.int32) for count in self.mask_counts])

    @cached_property
    def positions(self) -> mx.array:
        """Position of each row relative to the first row, int32 ``[num_rows]``."""
        drafts = self.num_pending - 1 + self.depths[1:]
        rows = np.concatenate([np.arange(self.num_pending), drafts, self.mask_positions])
        return mx.array(rows.astype(np.int32))

    @cached_property
    def mask_positions(self) -> np.ndarray:
        """Position of each mask row relative to the first row, ``[num_masks]``."""
        return self.num_pending + self.depths[self._mask_nodes] + self.mask_offsets

    @cached_property
    def _mask_nodes(self) -> np.ndarray:
        """The node that each mask row's group follows, ``[num_masks]``."""
        return np.repeat(np.arange(len(self.mask_counts)), self.mask_counts)

    def positions_from(self, offset: Any) -> mx.array:
        """Position of each row after ``offset`` cached ones, int32 ``[num_rows]``."""
        return self.positions + offset

    @cached_property
    def attention(self) -> mx.array:
        """Which row may see which row of the same step, bool ``[num_rows, num_rows]``."""
        split, rows, first, groups = (
            self.num_ordinary, self.num_rows, self.num_pending - 1, self._mask_nodes
        )  # fmt: skip
        sees = np.zeros((rows, rows), dtype=bool)
        sees[:first, :first] = np.tri(first, dtype=bool)
        sees[first:, :first] = True
        sees[first:split, first:split] = self.ancestry
        sees[split:, first:split] = self.ancestry[groups]
        same_group = groups[:, None] == groups[None]
        sees[split:, split:] = same_group & (self.mask_offsets[:, None] >= self.mask_offsets)
        return mx.array(sees)

    @property
    def is_plain(self) -> bool:
        """Whether all rows are pending ones, which stay whatever is accepted."""
        return self.num_rows == self.num_pending

    @cached_property
    def group_anchors(self) -> list[int]:
        """The node that each group with masks follows, ``[G]``."""
        return [anchor for anchor, count in enumerate(self.mask_counts) if count]

    @cached_property
    def group_index(self) -> mx.array:
        """Rows of the groups that have masks, ``[G, largest group]``, as in ``group_rows``."""
        return self.group_rows[mx.array(self.group_anchors)]

    def take_groups(self, rows: mx.array) -> mx.array:
        """Take the rows of groups, ``[rows, ...]`` to ``[G, largest group, ...]``."""
        return mx.take(rows, self.group_index, axis=0)

    def window_index(self, num_before: int) -> mx.array:
        """For each group that has masks, the rows up to the one it follows, and its own rows.

        Args:
            num_before: rows before the group, which a convolution over ``num_before + 1`` rows
                needs.

        Returns:
            Indices ``[G, num_before + largest group]`` into the step's rows with ``num_before``
            earlier rows in front of them.
        """
        first = mx.array(self.group_anchors) + self.num_pending  # the earlier rows shift the rest
        before = first[:, None] + mx.arange(num_before)
        return mx.concatenate([before, self.group_index + num_before], axis=1)

    def joined_groups(self, y: mx.array) -> mx.array:
        """Put groups ``[G, largest group, ...]`` into mask rows ``[1, num_masks, ...]``."""
        counts = [count for count in self.mask_counts if count]
        groups = [y[index : index + 1, :count] for index, count in enumerate(counts)]
        return mx.concatenate(groups, axis=1) if len(groups) > 1 else groups[0]

    @cached_property
    def group_rows(self) -> mx.array:
        """Row index of each mask of each group, int32 ``[1 + drafts, largest group]``.

        A group smaller than the largest repeats its last row (or row 0 if it is empty); the caller
        knows its length from ``mask_counts``.
        """
        starts = self.num_ordinary + np.cumsum((0, *self.mask_counts[:-1]))
        steps = np.arange(max(self.mask_counts))
        lasts = np.maximum(np.array(self.mask_counts) - 1, 0)
        rows = starts[:, None] + np.minimum(steps, lasts[:, None])
        return mx.array(np.minimum(rows, self.num_rows - 1).astype(np.int32))


def _check_parents(parents: Sequence[int], num_drafts: int) -> None:
    """Check that each draft follows an earlier node."""
    in_order = all(0 <= parent <= index for index, parent in enumerate(parents))
    if len(parents) != num_drafts or not in_order:
        raise ValueError(f"a tree needs an earlier parent for each of {num_drafts}: {parents}")


def tree_ancestry(parents: Sequence[int]) -> np.ndarray:
    """Whether a node is or descends from another, bool ``[1 + N, 1 + N]``, by parents ``[N]``."""
    sees = np.eye(1 + len(parents), dtype=bool)
    for node, parent in enumerate(parents, start=1):
        sees[node] |= sees[parent]
    return sees


def subtree_parents(parents: Sequence[int] | np.ndarray, nodes: Sequence[int]) -> tuple[int, ...]:
    """Parents of some nodes of a tree, counted among those nodes, as a layout has them.

    Args:
        parents: of all nodes, ``[N]``; see ``StepLayout``.
        nodes: counted from 1, each after its ancestors.
    """
    places = {0: 0} | {node: place for place, node in enumerate(nodes, start=1)}
    return tuple(places[int(parents[node - 1])] for node in nodes)


def linear_layout(*, num_pending: int, num_draft_tokens: int, num_masks: int) -> StepLayout:
    """Masks after the last draft only (the paper's linear decoding)."""
    return StepLayout(num_pending, num_draft_tokens, (0,) * num_draft_tokens + (num_masks,))


def quadratic_layout(*, num_pending: int, num_draft_tokens: int, num_masks: int) -> StepLayout:
    """Masks after the last pending row and every draft (the paper's quadratic decoding)."""
    return StepLayout(num_pending, num_draft_tokens, (num_masks,) * (num_draft_tokens + 1))


def plain_layout(*, num_pending: int = 1) -> StepLayout:
    """No drafts, no masks: plain decoding."""
    return StepLayout(num_pending, 0, (0,))


@dataclass(frozen=True)
class BatchLayout:
    """Rows of several answers' steps in one forward: all ordinary rows, then all mask rows.

    The gate is one split index again.  The caches of a batch (``caches.batch``) make sure that no
    row sees another answer's rows.

    Attributes:
        layouts: the steps.
        offsets: number of rows in the cache of each answer.
    """

    layouts: tuple[StepLayout, ...]
    offsets: tuple[int, ...]

    is_contiguous = False
    is_prompt_chunk = False

    @property
    def gate_split(self) -> int:
        """Index of the first mask row; equals the number of ordinary rows."""
        return sum(layout.num_ordinary for layout in self.layouts)

    @property
    def num_masks(self) -> int:
        """Mask rows of all steps together."""
        return sum(layout.num_masks for layout in self.layouts)

    @property
    def num_rows(self) -> int:
        """All rows of the forward."""
        return self.gate_split + self.num_masks

    @property
    def mask_offsets(self) -> np.ndarray:
        """Which mask token each mask row is, counted from 0, int32 ``[num_masks]``."""
        return np.concatenate([layout.mask_offsets for layout in self.layouts])

    @cached_property
    def positions(self) -> mx.array:
        """Position of each row in its own text, int32 ``[num_rows]``."""
        pairs = zip(self.layouts, self.offsets, strict=True)
        return self.pack([layout.positions_from(offset) for layout, offset in pairs], axis=0)

    def positions_from(self, offset: Any) -> mx.array:
        """The same: every row knows its position."""
        del offset
        return self.positions

    def pack(self, parts: Sequence[mx.array], *, axis: int) -> mx.array:
        """Put the rows of the steps, which lie along an axis, into one array."""
        split = [
            mx.split(part, [layout.num_ordinary], axis=axis) if layout.num_masks else [part]
            for part, layout in zip(parts, self.layouts, strict=True)
        ]
        masks = [rows[1] for rows in split if len(rows) > 1]
        return mx.concatenate([*(rows[0] for rows in split), *masks], axis=axis)

    def unpack(self, rows: mx.array, *, axis: int) -> list[mx.array]:
        """Split one array into the rows of each step."""
        masks = [layout.num_masks for layout in self.layouts if layout.num_masks]
        ordinary = [layout.num_ordinary for layout in self.layouts]
        ends = list(accumulate(chain(ordinary, masks)))
        parts = iter(mx.split(rows, ends[:-1], axis=axis))
        ordinary_parts = [next(parts) for _ in self.layouts]
        return [
            mx.concatenate([part, next(parts)], axis=axis) if layout.num_masks else part
            for part, layout in zip(ordinary_parts, self.layouts, strict=True)
        ]


@dataclass(frozen=True)
class MaskRun:
    """Mask rows that follow each other and see all rows before: a ``RowLayout`` of one group."""

    num_masks: int

    gate_split = 0
    is_contiguous = True
    is_prompt_chunk = False

    def positions_from(self, offset: Any) -> mx.array:
        """Position of each row after ``offset`` cached ones, int32 ``[num_masks]``."""
        return mx.arange(self.num_masks) + offset


class MaskGroups(Protocol):
    """Groups of mask rows that run as a batch, short ones padded to the length of the largest."""

    def take_groups(self, rows: mx.array) -> mx.array:
        """Take the rows of the groups, ``[rows, ...]`` to ``[G, largest group, ...]``."""
        ...

    def joined_groups(self, y: mx.array) -> mx.array:
        """Put groups ``[G, largest group, ...]`` into mask rows ``[1, num_masks, ...]``."""
        ...


class RowLayout(Protocol):
    """What wrapped modules ask about the rows of a forward: a step, a batch or mask blocks."""

    @property
    def gate_split(self) -> int:
        """Index of the first mask row."""
        ...

    @property
    def num_masks(self) -> int:
        """Mask rows."""
        ...

    @property
    def is_contiguous(self) -> bool:
        """Whether every row's position follows that of the row before."""
        ...

    @property
    def is_prompt_chunk(self) -> bool:
        """Whether there are several rows, all of a prompt."""
        ...

    def positions_from(self, offset: Any) -> mx.array:
        """Position of each row after ``offset`` cached ones, int32 ``[rows]``."""
        ...


class StepScope:
    """The layout of the forward in progress, shared by the wrapped modules of one model.

    mlx-lm passes no layout to its modules; embedding, rotary embedding, gated linear layers and
    caches read it here.  ``layout`` is None outside a forward and for forwards whose rows are all
    ordinary and contiguous.  ``gated`` is True except in one ablation of training, where the
    low-rank weights act on ordinary rows too.  ``mixer`` is the call of a recurrent layer's mixer
    in progress, which short convolutions and recurrences look up.
    """

    def __init__(self) -> None:
        self.layout: RowLayout | None = None
        self.gated = True
        self.adapts_experts = False  # whether the experts in progress have mask rows (``experts``)
        self.mixer: MixerCall | None = None
        self._positions: tuple[RowLayout, int, mx.array] | None = None

    def positions_from(self, offset: Any) -> mx.array:
        """Position of each row after ``offset`` cached ones; the layers of a forward share them."""
        layout = self.layout
        assert layout is not None
        if not isinstance(offset, int):
            return layout.positions_from(offset)
        known = self._positions
        if known is None or known[0] is not layout or known[1] != offset:
            known = self._positions = (layout, offset, layout.positions_from(offset))
        return known[2]

    @property
    def step(self) -> StepLayout | None:
        """The step in progress if some row does not see all rows before it."""
        layout = self.layout
        return layout if isinstance(layout, StepLayout) and not layout.is_contiguous else None
