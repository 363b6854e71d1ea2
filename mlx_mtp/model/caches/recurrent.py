"""The cache of one recurrent layer: the state after any row of a step, and exact rewinding to it.

A recurrent layer sums up a text in a few arrays, its slots: the last inputs of short convolutions,
and the state of a recurrence.  Unlike keys and values, they do not say what they were some rows
ago.  So during a step with drafts the cache captures the inputs of the ordinary rows.  Rewinding
only counts; when the next forward begins, the rows that were kept are run again from the state
before them, in the same calls as in plain decoding, so the state has the bits of plain decoding.
Mask rows start from states that are thrown away.

Arrays never change in place, so a checkpoint or a copy is a list of references.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.layout import MaskRun, RowLayout, StepLayout, plain_layout
from mlx_mtp.model.recurrence import RecurrenceCall, StepRecurrence
from mlx_mtp.model.row_by_row import Outputs, Slots, TakeRows, stacked

State = mx.array | None
MAX_CHECKPOINTS = 8  # of a cache; each keeps a state alive, which may take 100 MB in a large model


class Replay:
    """A state to which rows that were kept are still to be applied.

    Attributes:
        before: the state before the rows.
        call: the recurrence with the rows.
    """

    def __init__(self, call: RecurrenceCall, before: State) -> None:
        self.call = call
        self.before = before
        self._after: State = None

    @property
    def after(self) -> State:
        """The state after the rows."""
        if self._after is None:
            self._after = self.call.state_after(self.call.num_rows, self.before)
        return self._after


Slot = mx.array | Replay | None


class RecurrentLayerCache:
    """The slots of one recurrent layer; mlx-lm's mixers take it for an ``ArraysCache``.

    Attributes:
        offset: number of rows, those of the forward in progress included.
        checkpoints: ``(offset, slots)`` of places to rewind to, in rising order.
    """

    lengths = None  # of mlx-lm's batches
    left_padding = None
    drops_rows = False

    def __init__(self, num_slots: int) -> None:
        self.offset = 0
        self.checkpoints: list[tuple[int, Slots]] = [(0, [None] * num_slots)]
        self._slots: list[Slot] = [None] * num_slots
        self._layout = plain_layout()
        self._row_layout: RowLayout | None = None  # as the forward has it, which may be masks only
        # Of the last forward: its first slots, its rows that are left, and by slot the state after
        # so many of them.
        self._start: list[Slot] = list(self._slots)
        self._num_left = 0
        self._captured: dict[int, Callable[[int], Slot]] = {}

    # What mlx-lm's mixers ask.

    def __getitem__(self, slot: int) -> State:
        """Return a slot; of a state with rows to repeat that before them, see ``recur``."""
        value = self._slots[slot]
        return value.before if isinstance(value, Replay) else value

    def __setitem__(self, slot: int, value: State) -> None:
        """Store a slot, unless rows of the forward may be rejected."""
        if self.layout is None and value is not None:
            # A slice would keep all rows of a prompt chunk alive.
            self._slots[slot] = mx.contiguous(value) if self._num_left > 1 else value

    def make_mask(self, num_rows: int, **options: Any) -> None:
        """Return no mask, because there is no padding."""
        del num_rows, options

    def advance(self, num_rows: int) -> None:
        """Ignore mlx-lm's count of rows; ``begin_forward`` has counted them."""
        del num_rows

    # What the seams ask.

    @property
    def layout(self) -> StepLayout | None:
        """Rows of the forward in progress; None if all of them stay."""
        return None if self._layout.is_plain else self._layout

    def convolve(self, slot: int, conv: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """Convolve rows; see ``recurrence.StateCache``."""
        layout = self.layout
        if layout is None:
            return conv(x)
        num_before = x.shape[1] - layout.num_rows
        ordinary = x[:, : num_before + layout.num_ordinary]
        first = _first_captured(layout)
        inputs = mx.contiguous(ordinary[:, first:]) if first else ordinary
        self.capture(slot, lambda kept: inputs[:, kept - first : kept - first + num_before])
        y = conv(ordinary)
        if layout.num_masks == 0:
            return y
        groups = mx.take(x[0], layout.window_index(num_before), axis=0)  # [G, K - 1 + m, C]
        return mx.concatenate([y, layout.joined_groups(conv(groups))], axis=1)

    def recur(self, call: RecurrenceCall, step: StepRecurrence | None) -> tuple[mx.array, State]:
        """Run a recurrence over the rows of the forward; see ``recurrence.StateCache``."""
        slot = len(self._slots) - 1
        if step is not None and self._layout.num_pending == 1:
            result = self._recur_with(step, call, slot)
            if result is not None:
                return result
        state = self._settled(slot)
        self._slots[slot] = self._start[slot] = state
        if self.layout is None:
            return call.run(state)
        return self._recur(call, self.layout, slot, state), state

    def capture(self, slot: int, after: Callable[[int], Slot]) -> None:
        """Take note of a slot's value after any number of ordinary rows that may be kept."""
        self._captured[slot] = after

    def run_mixer(self, call: TakeRows) -> Outputs:
        """Run a mixer that has no seam; see ``row_by_row.MixerCache``.

        Pending rows are one call, each draft and all mask groups are calls of their own.
        """
        before, layout = self.slots(), self.layout
        if layout is None:
            y, slots = call(lambda x: x, before, self._row_layout)
            for slot, value in enumerate(slots):
                self[slot] = value
            return y
        ends = range(layout.num_pending, layout.num_ordinary + 1)
        ys, states, slots, first = [], [], before, 0
        for end in ends:
            y, slots = call(lambda x, first=first, end=end: x[:, first:end], slots, None)
            ys.append(y)
            states.append(slots)
            first = end
        if layout.num_masks:
            starts = stacked([states[anchor] for anchor in layout.group_anchors])
            masks = MaskRun(layout.group_index.shape[1])
            y, _ = call(lambda x: layout.take_groups(x[0]), starts, masks)
            ys.append([layout.joined_groups(group) for group in y])
        for slot, value in enumerate(before):
            if states[0][slot] is not value:  # rwkv's layers have two mixers, with own slots
                self.capture(slot, lambda kept, slot=slot: states[kept - ends[0]][slot])
        return [mx.concatenate(list(parts), axis=1) for parts in zip(*ys, strict=True)]

    @property
    def num_slots(self) -> int:
        """Number of slots."""
        return len(self._slots)

    def slots(self) -> Slots:
        """All slots as arrays."""
        return [self._settled(slot) for slot in range(len(self._slots))]

    @property
    def missing_slots(self) -> list[int]:
        """Slots that no seam has captured in a forward with drafts."""
        return [slot for slot in range(len(self._slots)) if slot not in self._captured]

    def _recur(self, call: RecurrenceCall, layout: StepLayout, slot: int, state: State) -> mx.array:
        """Run ordinary rows in sequence, then mask groups as a batch.

        Pending rows are one call, as in mlx-lm's prefill.  After them a recurrence that is
        sequential runs on to the next row whose state is needed; another one runs row by row.
        """
        pending, ordinary = layout.num_pending, layout.num_ordinary
        sequential, axis = call.recurrence.sequential, call.recurrence.axis
        anchors = [pending + anchor for anchor in layout.group_anchors]
        # Masks may continue the last row, unless there is a better way for rows without a state.
        in_line = sequential and (
            not anchors or (anchors == [ordinary] and call.function.outputs is None)
        )
        ends = set(range(pending, ordinary + 1))
        if in_line:
            ends = {layout.num_rows, *([pending] if pending > 1 else [])}
        elif sequential:
            ends = {pending, ordinary, *anchors}
        ys, states, first = [], {0: state}, 0
        for end in sorted(ends):
            y, state = call.cut(first, end).run(state)
            ys.append(y)
            states[end], first = state, end
        self._capture_rows(call, layout, slot, states)
        if layout.num_masks and not in_line:
            starts: Any = [states[anchor] for anchor in anchors]
            ys.append(call.run_groups(layout, starts))
        return mx.concatenate(ys, axis=axis) if len(ys) > 1 else ys[0]

    def _capture_rows(
        self, call: RecurrenceCall, layout: StepLayout, slot: int, states: dict[int, State]
    ) -> None:
        """Capture the rows that may be kept."""
        first = _first_captured(layout)
        before, rows = states[first], call.cut(first, layout.num_ordinary)
        rows = (rows.copied() if first else rows).for_state()
        self.capture(
            slot, lambda kept: Replay(rows.cut(0, kept - first), before) if kept > first else before
        )

    def _recur_with(
        self, step: StepRecurrence, call: RecurrenceCall, slot: int
    ) -> tuple[mx.array, State] | None:
        """Let a back-end run the rows, if it takes them."""
        value = self._slots[slot]
        kept = value.call.rows if isinstance(value, Replay) else None
        result = step(call, self._layout, self[slot], kept)
        if result is None:
            return None
        y, state = result
        rows = call.cut(0, self._layout.num_ordinary).for_state()
        self._start[slot] = state
        self.capture(slot, lambda kept: Replay(rows.cut(0, kept), state) if kept else state)
        return y, None

    def _settled(self, slot: int) -> State:
        """Return a slot as an array."""
        return _settled(self._slots[slot])

    # What an answer's caches ask.

    def begin_forward(self, num_rows: int, layout: RowLayout | None) -> None:
        """Begin a forward: keep what is left of the rows of the last one."""
        self._settle()
        self._layout = (
            layout if isinstance(layout, StepLayout) else plain_layout(num_pending=num_rows)
        )
        self._row_layout = layout
        self._start, self._num_left = list(self._slots), num_rows
        self.offset += num_rows

    def _settle(self) -> None:
        """Put the state after the rows that were kept into the slots."""
        self._slots, self._captured = self._values(), {}
        self._start, self._num_left = self._slots, 0

    def _values(self) -> list[Slot]:
        """The slots after the rows that are left of the last forward."""
        if self._num_left == 0:
            return list(self._start)
        captured = {slot: after(self._num_left) for slot, after in self._captured.items()}
        return [captured.get(slot, value) for slot, value in enumerate(self._slots)]

    def begin_step(self) -> None:
        """Do nothing: no row is out of sight."""

    def rewind(self, num_rows: int) -> None:
        """Drop the last rows: some of the last forward, or all after a checkpoint."""
        assert self.can_rewind(num_rows), f"cannot rewind {num_rows} of {self.offset} rows"
        self.offset -= num_rows
        # Later ones are of a text that other rows may now replace.
        self.checkpoints = [each for each in self.checkpoints if each[0] <= self.offset]
        if num_rows <= self._num_left:
            self._num_left -= num_rows
            return
        slots: list[Slot] = [*dict(self.checkpoints)[self.offset]]
        self._slots, self._start, self._num_left = slots, list(slots), 0
        self._captured = {}

    def can_rewind(self, num_rows: int) -> bool:
        """Whether that many rows can be dropped exactly."""
        kept = self._num_left - num_rows
        if num_rows == 0 or kept == 0:
            return True
        if kept > 0:
            layout = self.layout
            return layout is not None and layout.num_pending <= kept <= layout.num_ordinary
        return any(offset == self.offset - num_rows for offset, _ in self.checkpoints)

    def checkpoint(self) -> None:
        """Make it possible to rewind to here later."""
        if self.checkpoints[-1][0] < self.offset:
            slots = [_settled(value) for value in self._values()]
            first, *others = self.checkpoints
            last = (self.offset, slots)
            self.checkpoints = [first, *others[-(MAX_CHECKPOINTS - 1) :], last]

    def restore(self, offset: int, slots: Slots) -> None:
        """Continue after ``offset`` rows, which can also be rewound to."""
        self.offset, self._num_left, self._captured = offset, 0, {}
        self._slots, self._start = list(slots), list(slots)
        self.checkpoints = [self.checkpoints[0], (offset, slots)]

    def slots_at(self, offset: int) -> Slots | None:
        """The slots after ``offset`` rows, if they are known: now, or at a checkpoint."""
        if offset == self.offset:
            self._settle()
            return self.slots()
        return dict(self.checkpoints).get(offset)

    def rewind_points(self) -> list[int]:
        """Offsets before the current one that can be rewound to."""
        start = self.offset - self._num_left
        points = {offset for offset, _ in self.checkpoints} | {start}
        if self.layout is not None:
            layout = self.layout
            points |= set(range(start + layout.num_pending, start + layout.num_ordinary + 1))
        return sorted(point for point in points if point < self.offset)

    def copied(self) -> RecurrentLayerCache:
        """Make an independent copy, which shares all arrays."""
        other = copy.copy(self)
        other.checkpoints, other._slots = list(self.checkpoints), list(self._slots)
        other._start, other._captured = list(self._start), dict(self._captured)
        return other

    @property
    def state(self) -> list[mx.array]:
        """The arrays, for evaluation."""
        found: list[mx.array] = []
        for value in self._values():
            if isinstance(value, Replay):
                found += [x for x in (value.before, *value.call.rows.values()) if x is not None]
            elif value is not None:
                found.append(value)
        return found

    @classmethod
    def from_mlx_lm(cls, inner: Any, *, offset: int) -> RecurrentLayerCache:
        """Take over the slots of an ``ArraysCache`` after ``offset`` rows."""
        cache = cls(len(inner.cache))
        cache.offset = offset
        cache._slots = list(inner.cache)
        cache._start = list(inner.cache)
        cache.checkpoints = [(offset, list(inner.cache))]
        return cache

    def to_mlx_lm(self, into: Any = None) -> Any:
        """Return the slots as an ``ArraysCache``.

        Args:
            into: the cache that these slots came from, which is updated.
        """
        self._settle()
        cache = lm_cache.ArraysCache(len(self._slots)) if into is None else into
        cache.cache = self.slots()
        return cache


def _settled(value: Slot) -> State:
    """Return a slot as an array."""
    return value.after if isinstance(value, Replay) else value


def _first_captured(layout: StepLayout) -> int:
    """The first row to capture: a prompt chunk stays as a whole, so only drafts after it count."""
    return layout.num_pending if layout.num_pending > 1 else 0
