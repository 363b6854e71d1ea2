"""Many mask blocks of one sequence in one forward.

An anchor is the last token that a block of k masks sees.  After the anchor at position i follow
masks at i+1 .. i+k; mask j sees the sequence up to its anchor and the masks of its own block up to
itself, and predicts the token at i+j+1 (arXiv 2507.11851, section 3.1).  The ordinary rows are in
the cache already, so a forward has mask rows only.

    sequence  x_0 x_1 x_2 x_3 x_4 x_5          position   sees           predicts
    anchor 1          m_1 m_2                  2 3        x_0 x_1        x_3 x_4
    anchor 2              m_1 m_2              3 4        x_0 x_1 x_2    x_4 x_5
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class MaskRows:
    """The mask rows of one forward, a ``RowLayout`` without ordinary rows.

    Attributes:
        anchors: position of the last token that each block sees.
        masks_per_block: number of masks of every block, or one number per block.
    """

    anchors: tuple[int, ...]
    masks_per_block: int | tuple[int, ...]

    is_contiguous = False
    is_prompt_chunk = False

    @property
    def gate_split(self) -> int:
        """Index of the first mask row."""
        return 0

    @property
    def num_masks(self) -> int:
        """Number of mask rows of all blocks, R."""
        return int(self._counts.sum())

    @property
    def num_rows(self) -> int:
        """Number of rows of the forward."""
        return self.num_masks

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.broadcast_to(np.array(self.masks_per_block, dtype=np.int32), len(self.anchors))

    @cached_property
    def mask_offsets(self) -> np.ndarray:
        """Index of each row's mask token, int32 ``[R]``."""
        starts = np.cumsum(self._counts) - self._counts
        return np.arange(self.num_masks, dtype=np.int32) - np.repeat(starts, self._counts)

    @cached_property
    def row_blocks(self) -> np.ndarray:
        """Index of each row's block, int ``[R]``."""
        return np.repeat(np.arange(len(self.anchors)), self._counts)

    @cached_property
    def row_anchors(self) -> np.ndarray:
        """The anchor of each row, int32 ``[R]``."""
        return np.repeat(np.array(self.anchors, dtype=np.int32), self._counts)

    @cached_property
    def row_positions(self) -> np.ndarray:
        """Position of each row in the sequence, int32 ``[R]``."""
        return self.row_anchors + 1 + self.mask_offsets

    @cached_property
    def positions(self) -> mx.array:
        """``row_positions`` on the device."""
        return mx.array(self.row_positions)

    @cached_property
    def group_index(self) -> mx.array:
        """Rows of the blocks, int32 ``[G, largest block]``; short ones repeat their last row.

        There are at least two columns, because some recurrences have no gradient for one row.
        """
        starts = np.cumsum(self._counts) - self._counts
        steps = np.arange(max(int(self._counts.max()), 2))
        return mx.array(starts[:, None] + np.minimum(steps, self._counts[:, None] - 1))

    def take_groups(self, rows: mx.array) -> mx.array:
        """Take the rows of the blocks, ``[rows, ...]`` to ``[G, largest block, ...]``."""
        return mx.take(rows, self.group_index, axis=0)

    def joined_groups(self, y: mx.array) -> mx.array:
        """Put blocks ``[G, largest block, ...]`` into rows ``[1, R, ...]``."""
        return y[mx.array(self.row_blocks), mx.array(self.mask_offsets)][None]

    def positions_from(self, offset: Any) -> mx.array:
        """Position of each row, int32 ``[R]``; it is known without ``offset``."""
        del offset
        return self.positions

    def attention(
        self, num_cached: int, window: int | None = None, *, chunk: int | None = None
    ) -> mx.array:
        """Which cached rows and mask rows each row sees, bool ``[R, num_cached + R]``.

        Args:
            num_cached: number of cached rows.
            window: number of rows that a row sees, if that is limited.
            chunk: number of positions of which a row sees only its own, likewise.
        """
        cached = np.arange(num_cached)
        sees_cached = cached[None] <= self.row_anchors[:, None]
        blocks = self.row_blocks
        sees_masks = (blocks[:, None] == blocks[None]) & (
            self.mask_offsets[None] <= self.mask_offsets[:, None]
        )
        sees: Any = np.concatenate([sees_cached, sees_masks], axis=1)
        rows, positions = self.row_positions[:, None], np.append(cached, self.row_positions)[None]
        if window is not None:
            sees &= rows - positions < window
        if chunk is not None:
            sees &= rows // chunk == positions // chunk
        return mx.array(sees)
