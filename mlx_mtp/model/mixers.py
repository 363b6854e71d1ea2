"""Finds the mixers of a model's recurrent layers and puts their seams in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.caches.recurrent import RecurrentLayerCache
from mlx_mtp.model.layout import StepLayout, StepScope, plain_layout
from mlx_mtp.model.recurrence import RecurrenceSeam
from mlx_mtp.model.row_by_row import RowByRow
from mlx_mtp.model.wrappers import StepConv, Wrapper, replace

Forward = Callable[[StepLayout], MTPCache]
"""Builds a forward of a step, which is never evaluated; returns its caches, new at its start."""


@dataclass(frozen=True)
class _Mixer:
    """A module that is called with the cache of a recurrent layer, and that cache."""

    module: nn.Module
    cache: RecurrentLayerCache


def wrap_mixers(base: nn.Module, forward: Forward, *, scope: StepScope) -> None:
    """Let the recurrent layers of a model pass their rows on to their caches, in place.

    A mixer with a state that goes through none of the seams of ``recurrence`` is called run by run
    (``row_by_row``).

    Args:
        base: an mlx-lm model with recurrent layers.
        forward: runs it.
        scope: the model's step scope.

    Raises:
        ValueError: a layer keeps its state in another way.
    """
    _unwrap(base)
    mixers, caches = _find_mixers(base, forward)
    indices = {path: caches.recurrent_layers.index(each.cache) for path, each in mixers.items()}
    wrapped, convs = {}, {}
    for path, mixer in mixers.items():
        wrapped[path] = RecurrenceSeam(mixer.module, scope=scope)
        convs |= {f"{path}.{name}": conv for name, conv in _short_convs(mixer.module)}
    replace(base, wrapped)
    replace(base, {path: StepConv(conv, scope=scope) for path, conv in convs.items()})
    layers = forward(StepLayout(1, 1, (0, 0))).recurrent_layers
    rest = {path: mixers[path] for path, index in indices.items() if layers[index].missing_slots}
    for path, mixer in rest.items():
        own = {key: conv for key, conv in convs.items() if key.startswith(f"{path}.")}
        replace(base, own)
        replace(base, {path: RowByRow(mixer.module, scope=scope)})
    if rest or not mixers:
        layers = forward(StepLayout(1, 1, (0, 0))).recurrent_layers
    if any(layer.missing_slots for layer in layers):
        raise ValueError("its recurrent layers keep a state that cannot be rewound")


def _unwrap(base: nn.Module) -> None:
    """Take out the seams of an ``MTPModel`` that was made of the same model before."""
    for path, module in base.named_modules():
        if isinstance(module, RecurrenceSeam | RowByRow | StepConv):
            replace(base, {path: module.wrapped})


def _find_mixers(base: nn.Module, forward: Forward) -> tuple[dict[str, _Mixer], MTPCache]:
    """Find the innermost modules, by path, that are called with a recurrent layer's cache."""
    modules = {
        path: module
        for path, module in base.named_modules()
        if path and "cache" in inspect.signature(type(module).__call__).parameters
    }
    called: dict[str, _Mixer] = {}
    paths = sorted(modules, key=lambda path: path.count("."))
    for path in reversed(paths):  # a spy is made after those inside its module
        replace(base, {path: _Spy(modules[path], path, called)})
    try:
        caches = forward(plain_layout())
    finally:
        for path in paths:
            replace(base, {path: modules[path]})
    innermost = {
        path: mixer
        for path, mixer in called.items()
        if not any(other.startswith(f"{path}.") for other in called)
    }
    return innermost, caches


class _Spy(Wrapper):
    """Notes that a module is called with the cache of a recurrent layer."""

    def __init__(self, module: nn.Module, path: str, called: dict[str, _Mixer]) -> None:
        super().__init__(module)
        object.__setattr__(self, "_notes", (path, called))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        path, called = self._notes
        for value in (*args, *kwargs.values()):
            if isinstance(value, RecurrentLayerCache):
                called[path] = _Mixer(self.wrapped, value)
        return self.wrapped(*args, **kwargs)


def _short_convs(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The convolutions of a mixer in the order of their definition, which is that of its slots."""
    for name, child in module.children().items():
        if isinstance(child, nn.Conv1d):
            yield f"{path}{name}", child
        elif isinstance(child, nn.Module):
            yield from _short_convs(child, f"{path}{name}.")
