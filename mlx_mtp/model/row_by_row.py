"""A mixer whose recurrence has no seam: called once for each run of rows.

Its weights are read once for each draft instead of once for all rows, which costs more than
``recurrence.RecurrenceSeam`` does; but nothing needs to be known about the mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from mlx_mtp.model.caches.recurrent import RecurrentLayerCache
from mlx_mtp.model.layout import MaskRun, StepLayout, StepScope
from mlx_mtp.model.wrappers import Wrapper

Outputs = Sequence[mx.array]


class RowByRow(Wrapper):
    """A mixer that gets the pending rows, each draft and all mask groups in calls of their own.

    Its cache is one of mlx-lm's in each call, with the state before the rows.
    """

    def __init__(self, mixer: nn.Module, *, scope: StepScope) -> None:
        super().__init__(mixer)
        self._scope = scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the mixer; arrays ``[1, L, ...]`` among the arguments have the rows."""
        values = (*args, *kwargs.values())
        cache = next((value for value in values if isinstance(value, RecurrentLayerCache)), None)
        if cache is None:
            return self.wrapped(*args, **kwargs)
        inner = ArraysCache(len(cache.slots()))
        inner.cache = cache.slots()

        def call(rows_of: Callable[[mx.array], mx.array]) -> Outputs:
            def value_of(value: Any) -> Any:
                if value is cache:
                    return inner
                return rows_of(value) if _has_rows(value) else value

            named = {name: value_of(value) for name, value in kwargs.items()}
            y = self.wrapped(*map(value_of, args), **named)
            return y if isinstance(y, tuple) else [y]

        if cache.layout is None:
            y = call(lambda x: x)
            cache.store(inner.cache)
        else:
            y = self._call_runs(call, inner, cache, cache.layout)
        return tuple(y) if len(y) > 1 else y[0]

    def _call_runs(
        self,
        call: Callable[[Callable[[mx.array], mx.array]], Outputs],
        inner: ArraysCache,
        cache: RecurrentLayerCache,
        layout: StepLayout,
    ) -> Outputs:
        """Call the mixer for each run of a step's rows and capture the slots after each."""
        before, step_layout = inner.cache, self._scope.layout
        inner.cache = list(before)
        ends = range(layout.num_pending, layout.num_ordinary + 1)
        ys, states, first = [], [], 0
        try:
            self._scope.layout = None
            for end in ends:
                ys.append(call(lambda x, first=first, end=end: x[:, first:end]))
                states.append(list(inner.cache))
                first = end
            if layout.num_masks:
                inner.cache = _stacked([states[anchor] for anchor in layout.group_anchors])
                self._scope.layout = MaskRun(max(layout.mask_counts))
                groups = call(lambda x: mx.take(x[0], layout.group_index, axis=0))
                ys.append([layout.joined_groups(group) for group in groups])
        finally:
            self._scope.layout = step_layout
        for slot, value in enumerate(before):
            if states[0][slot] is not value:  # rwkv's layers have two mixers, with own slots
                cache.capture(slot, lambda kept, slot=slot: states[kept - ends[0]][slot])
        return tuple(mx.concatenate(list(parts), axis=1) for parts in zip(*ys, strict=True))


def _has_rows(value: Any) -> bool:
    """Whether an argument is ``[1, L, ...]``, and not an attention mask ``[L, S]``."""
    return isinstance(value, mx.array) and value.ndim > 2


def _stacked(states: Sequence[Sequence[mx.array | None]]) -> list[mx.array | None]:
    """Put the slots of several states together as a batch."""
    slots: Any = zip(*states, strict=True)
    return [None if slot[0] is None else mx.concatenate(slot) for slot in slots]
