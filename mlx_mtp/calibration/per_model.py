"""Values that are remembered for a model as long as it lives, without attributes on the model."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class PerModel(Generic[Value]):
    """A dictionary by the identity of models, which are not hashable."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}

    def get(self, model: Any) -> Value | None:
        """The value of a model, or None."""
        return self._values.get(id(model))

    def set(self, model: Any, value: Value) -> None:
        """Remember a value until the model is gone."""
        if id(model) not in self._values:
            weakref.finalize(model, self._values.pop, id(model), None)
        self._values[id(model)] = value

    def forget(self, model: Any) -> None:
        """Drop the value of a model."""
        self._values.pop(id(model), None)
