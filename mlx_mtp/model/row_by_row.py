"""A mixer whose recurrence has no seam: called once for each run of rows.

Its weights are read once for each draft instead of once for all rows, which costs more than
``recurrence.RecurrenceSeam`` does; but nothing needs to be known about the mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from mlx_mtp.model.layout import RowLayout, StepScope
from mlx_mtp.model.wrappers import Wrapper

Outputs = Sequence[mx.array]
Slots = list[mx.array | None]


class TakeRows(Protocol):
    """A mixer that is called with some of its rows."""

    def __call__(
        self, rows_of: Callable[[mx.array], mx.array], slots: Slots, layout: RowLayout | None
    ) -> tuple[Outputs, Slots]:
        """Call the mixer.

        Args:
            rows_of: takes the rows, ``[B, L, D]``, out of all rows ``[1, rows, D]``.
            slots: the slots before the rows; they are not changed.
            layout: the rows, if they are mask rows.

        Returns:
            Its outputs, and the slots after the rows.
        """
        ...


class MixerCache(Protocol):
    """What ``RowByRow`` asks of its cache."""

    def run_mixer(self, call: TakeRows) -> Outputs:
        """Run the rows of the forward through a mixer.

        Returns:
            Its outputs ``[1, rows, D]``.
        """
        ...


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
        cache = next((value for value in values if hasattr(value, "run_mixer")), None)
        if cache is None:
            return self.wrapped(*args, **kwargs)

        def call(
            rows_of: Callable[[mx.array], mx.array], slots: Slots, layout: RowLayout | None
        ) -> tuple[Outputs, Slots]:
            inner = ArraysCache(len(slots))
            inner.cache = list(slots)

            def value_of(value: Any) -> Any:
                if value is cache:
                    return inner
                return rows_of(value) if _has_rows(value) else value

            named = {name: value_of(value) for name, value in kwargs.items()}
            before, self._scope.layout = self._scope.layout, layout
            try:
                y = self.wrapped(*map(value_of, args), **named)
            finally:
                self._scope.layout = before
            return y if isinstance(y, tuple) else [y], inner.cache

        y = cache.run_mixer(call)
        return tuple(y) if len(y) > 1 else y[0]


def _has_rows(value: Any) -> bool:
    """Whether an argument is ``[1, L, ...]``, and not an attention mask ``[L, S]``."""
    return isinstance(value, mx.array) and value.ndim > 2


def stacked(states: Sequence[Sequence[mx.array | None]]) -> list[mx.array | None]:
    """Put the slots of several states together as a batch."""
    slots: Any = zip(*states, strict=True)
    return [None if slot[0] is None else mx.concatenate(slot) for slot in slots]
