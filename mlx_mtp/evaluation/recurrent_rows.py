"""Recurrent layers in a forward over mask blocks of a sequence.

The ordinary rows are computed once, and their inputs of convolutions and recurrences are recorded.
Every mask block then starts from the state after its anchor, which follows from these inputs, as in
a step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_mtp.evaluation.mask_blocks import MaskRows
from mlx_mtp.model.layout import MaskRun
from mlx_mtp.model.recurrence import RecurrenceCall, StepRecurrence
from mlx_mtp.model.row_by_row import Outputs, Slots, TakeRows, stacked

Conv = Callable[[mx.array], mx.array]
Continue = Callable[[int, int, Any], Any]  # from row, to row, value before; the value after


class _AfterAnchors:
    """Values after rows of a sequence, each computed from the one before it.

    Args:
        continued: returns the value after some more rows.
    """

    def __init__(self, continued: Continue) -> None:
        self._continued = continued
        self._last: tuple[int, Any] = (0, None)

    def __call__(self, anchors: Sequence[int]) -> list[Any]:
        """Return the value after each of these rows, which ascend."""
        position, value = self._last if self._last[0] <= anchors[0] else (0, None)
        values = []
        for anchor in anchors:
            value = self._continued(position, anchor + 1, value)
            position = anchor + 1
            values.append(value)
        self._last = (position, value)
        return values


class _NoSlots:
    """What mlx-lm's mixers ask of a cache that keeps no state: its rows start a text."""

    lengths = None
    left_padding = None

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots

    def __getitem__(self, slot: int) -> None:
        """Return no state."""
        if slot >= self.num_slots:  # some mixers unpack the slots
            raise IndexError(slot)

    def __setitem__(self, slot: int, value: Any) -> None:
        """Ignore a state."""

    def make_mask(self, num_rows: int, **options: Any) -> None:
        """Return no mask, because there is no padding."""
        del num_rows, options

    def advance(self, num_rows: int) -> None:
        """Ignore mlx-lm's count of rows."""


class RecordedRows(_NoSlots):
    """A recurrent layer's cache in the forward over the ordinary rows: records their inputs.

    Args:
        num_slots: number of slots of the layer.
        gradient: whether to keep the gradient of the inputs.
    """

    offset = 0

    def __init__(self, num_slots: int, *, gradient: bool) -> None:
        super().__init__(num_slots)
        self._detached = (lambda x: x) if gradient else mx.stop_gradient
        self._inputs: dict[int, mx.array] = {}
        self.states: Callable[[Sequence[int]], list[Any]] | None = None
        self.mixers: list[Callable[[Sequence[int]], list[Slots]]] = []

    def convolve(self, slot: int, conv: Conv, x: mx.array) -> mx.array:
        """Convolve rows; see ``recurrence.StateCache``."""
        self._inputs[slot] = self._detached(x)
        return conv(x)

    def recur(
        self, call: RecurrenceCall, step: StepRecurrence | None
    ) -> tuple[mx.array, mx.array | None]:
        """Run a recurrence; see ``recurrence.StateCache``."""
        del step  # a back-end's function has no gradient
        rows = {name: self._detached(value) for name, value in call.rows.items()}
        recorded = call.with_rows(rows)
        self.states = _AfterAnchors(
            lambda first, end, state: recorded.cut(first, end).run(state)[1]
        )
        return call.run(None)

    def run_mixer(self, call: TakeRows) -> Outputs:
        """Run a mixer that has no seam; see ``row_by_row.MixerCache``."""

        def after(first: int, end: int, slots: Slots | None) -> Slots:
            before: Slots = slots or [None] * self.num_slots
            return call(lambda x: self._detached(x[:, first:end]), before, None)[1]

        self.mixers.append(_AfterAnchors(after))
        return call(lambda x: x, [None] * self.num_slots, None)[0]

    def last_inputs(self, slot: int, anchors: Sequence[int], count: int) -> mx.array:
        """The inputs of a convolution up to each of some rows, ``[G, count, C]``."""
        first = mx.array(list(anchors)) + 1  # there are ``count`` inputs before the first row
        return mx.take(self._inputs[slot][0], first[:, None] + mx.arange(count), axis=0)

    @property
    def arrays(self) -> list[mx.array]:
        """The recorded convolution inputs, for evaluation; other inputs follow with them."""
        return list(self._inputs.values())


class StatesAtAnchors(_NoSlots):
    """A recurrent layer's cache in the forward over mask rows.

    Attributes:
        offset: 0, because mask rows have their positions in the sequence.
        carried: number of mixers that have run.
    """

    offset = 0

    def __init__(self, recorded: RecordedRows, rows: MaskRows) -> None:
        super().__init__(recorded.num_slots)
        self._recorded = recorded
        self._rows = rows
        self.carried = 0

    def convolve(self, slot: int, conv: Conv, x: mx.array) -> mx.array:
        """Convolve mask blocks, each after the inputs up to its anchor."""
        count = x.shape[1] - self._rows.num_rows
        before = self._recorded.last_inputs(slot, self._rows.anchors, count)
        blocks = self._rows.take_groups(x[0, count:])  # [G, m, C]
        y = conv(mx.concatenate([before.astype(x.dtype), blocks], axis=1))
        return self._rows.joined_groups(y)

    def recur(
        self, call: RecurrenceCall, step: StepRecurrence | None
    ) -> tuple[mx.array, mx.array | None]:
        """Run mask blocks, each from the state after its anchor."""
        del step
        assert self._recorded.states is not None
        states = mx.concatenate(self._recorded.states(self._rows.anchors))
        return call.run_groups(self._rows, states), None

    def run_mixer(self, call: TakeRows) -> Outputs:
        """Run mask blocks through a mixer that has no seam; see ``RecordedRows``."""
        slots = stacked(self._recorded.mixers[self.carried](self._rows.anchors))
        self.carried += 1
        layout = MaskRun(self._rows.group_index.shape[1])
        y, _ = call(lambda x: self._rows.take_groups(x[0]), slots, layout)
        return [self._rows.joined_groups(group) for group in y]
