"""The seam in recurrent layers: what a mixer of mlx-lm calls to pass its rows through its state.

A mixer projects its rows, passes them through a short convolution and a recurrence, whose states
are in the layer's cache, and projects the result.  The projections take all rows of a step at once.
In convolution and recurrence, ordinary rows run in sequence and each mask group starts from the
state after its own prefix, so both are passed on to the cache (``caches.recurrent``), which knows
the rows of the step.

mlx-lm's mixers call their recurrence by a global name of their own file.  As in ``attention``,
their code is run with a namespace in which that name is bound anew (``RecurrenceSeam``).  A
back-end can take over a whole step of a recurrence (``StepRecurrence``, ``inject_recurrence``).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.model.layout import MaskGroups, StepLayout, StepScope
from mlx_mtp.model.wrappers import Wrapper

Rows = Mapping[str, mx.array]
"""Arrays with a row axis by the name that they have as arguments of the recurrence."""


States = mx.array | list[mx.array]
"""States of a batch: ``[B, ...]``, or ``[1, ...]`` for each of it."""


@dataclass(frozen=True)
class Recurrence:
    """A recurrence of mlx-lm.

    Attributes:
        rows: names of the arguments that have a row axis.
        axis: that axis.
        state: name of the argument that is the state ``[B, ...]``; None starts a text.
        sequential: whether a call with several rows gives the bits of as many calls with one.
        read_only: a row that the state does not depend on, and one of its shape.
    """

    rows: tuple[str, ...]
    axis: int
    state: str
    sequential: bool
    read_only: tuple[str, str] | None = None


RECURRENCES = {
    "gated_delta_update": Recurrence(
        ("q", "k", "v", "a", "b"), 1, "state", sequential=True, read_only=("q", "k")
    ),
    "ssm_update": Recurrence(
        ("hidden_states", "B", "C", "dt"), 1, "state", sequential=False, read_only=("C", "B")
    ),
    "recurrent_gla": Recurrence(("q", "k", "v"), 2, "h", sequential=False),
}
"""Recurrences by the name of their function in mlx-lm.

``ssm_update`` and one ``recurrent_gla`` take several rows in chunks, another algebra than that of
one row, so rows that must equal plain decoding run one by one.
"""


@dataclass(frozen=True)
class RecurrenceFunction:
    """A function of mlx-lm that runs a recurrence, or a back-end's in its place.

    Attributes:
        update: takes the arguments of mlx-lm's by name; gives outputs and the state after the rows.
        outputs: gives outputs alone, for mask rows, which may differ from those of ``update`` by
            rounding; takes ``states``, see ``States``.  None where ``update`` is as good.
    """

    update: Callable[..., tuple[mx.array, mx.array]]
    outputs: Callable[..., mx.array] | None = None


@dataclass(frozen=True, eq=False)
class RecurrenceCall:
    """A call of a recurrence by a mixer.

    Attributes:
        name: name of the function in mlx-lm.
        rows: its rows, ``[1, L, ...]`` or with L at the axis of ``recurrence``.
        constants: the other arguments by name, such as ``A_log`` and ``dt_bias``, without the
            state.
        function: runs it.
    """

    name: str
    rows: Rows
    constants: Mapping[str, Any]
    function: RecurrenceFunction

    @classmethod
    def of(
        cls, name: str, function: RecurrenceFunction, arguments: Mapping[str, Any]
    ) -> RecurrenceCall:
        """Make the call from the function's arguments by name; their state is not needed."""
        kind = RECURRENCES[name]
        rows = {key: arguments[key] for key in kind.rows}
        left_out = {*kind.rows, kind.state}
        constants = {key: value for key, value in arguments.items() if key not in left_out}
        return cls(name, rows, constants, function)

    @property
    def recurrence(self) -> Recurrence:
        """The recurrence that is called."""
        return RECURRENCES[self.name]

    @property
    def num_rows(self) -> int:
        """Number of rows, L."""
        return self.rows[self.recurrence.rows[0]].shape[self.recurrence.axis]

    def cut(self, first: int, end: int) -> RecurrenceCall:
        """The same call for some rows only."""
        index = (slice(None),) * self.recurrence.axis + (slice(first, end),)
        return self.with_rows({key: value[index] for key, value in self.rows.items()})

    def run_groups(self, layout: MaskGroups, states: States) -> mx.array:
        """Run the mask groups of a forward as a batch.

        Args:
            layout: the groups.
            states: the state before each group.

        Returns:
            Outputs in the order of the mask rows.
        """
        axis = self.recurrence.axis
        y = self._grouped(layout).outputs(states)
        return mx.moveaxis(layout.joined_groups(mx.moveaxis(y, axis, 1)), 1, axis)

    def _grouped(self, layout: MaskGroups) -> RecurrenceCall:
        """The same call for the mask groups as a batch, ``[G, largest group, ...]``."""
        axis = self.recurrence.axis
        groups = {}
        for key, value in self.rows.items():
            rows = mx.moveaxis(value, axis, 1)[0]  # [L, ...]
            groups[key] = mx.moveaxis(layout.take_groups(rows), 1, axis)
        return self.with_rows(groups)

    def with_rows(self, rows: Rows) -> RecurrenceCall:
        """The same call for other rows."""
        return replace(self, rows=rows)

    def for_state(self) -> RecurrenceCall:
        """The same call without what only its outputs depend on."""
        if self.recurrence.read_only is None:
            return self
        unread, instead = self.recurrence.read_only
        return replace(self, rows={**self.rows, unread: self.rows[instead]})

    def copied(self) -> RecurrenceCall:
        """The same call with rows that keep no larger arrays alive."""
        return self.with_rows({key: mx.contiguous(value) for key, value in self.rows.items()})

    def run(self, state: mx.array | None) -> tuple[mx.array, mx.array]:
        """Call the function: outputs in the order of the rows, and the state after them."""
        state_argument = {self.recurrence.state: state}
        return self.function.update(**self.rows, **self.constants, **state_argument)

    def outputs(self, states: States) -> mx.array:
        """Call the function for a batch, whose states after the rows nobody needs."""
        outputs = self.function.outputs
        if outputs is not None:
            return outputs(**self.rows, **self.constants, states=states)
        return self.run(states if isinstance(states, mx.array) else mx.concatenate(states))[0]

    def state_after(self, num_rows: int, state: mx.array | None) -> mx.array | None:
        """The state after the first rows, with the bits of plain decoding."""
        if self.recurrence.sequential:
            return self.cut(0, num_rows).run(state)[1] if num_rows else state
        for row in range(num_rows):
            state = self.cut(row, row + 1).run(state)[1]
        return state


class StepRecurrence(Protocol):
    """A back-end's recurrence, which takes a whole step in one call.

    It first repeats the rows that the last step kept, then runs this step's ordinary rows in
    sequence and each mask group from the state after its own prefix.  So it reads the state once
    and writes it once, whatever the layout is.  Every ordinary row must have the bits that it has
    in a call of mlx-lm's function with one row.  It is not asked about prompt chunks: a step has
    one pending row.
    """

    def __call__(
        self,
        call: RecurrenceCall,
        layout: StepLayout,
        state: mx.array | None,
        kept: Rows | None,
    ) -> tuple[mx.array, mx.array] | None:
        """Run a step.

        For the gated delta rule (``gated_delta_update``) the rows are q, k ``[1, L, Hk, Dk]``,
        v ``[1, L, Hv, Dv]``, a ``[1, L, Hv]`` or ``[1, L, Hv, Dk]``, b ``[1, L, Hv]``, the state is
        float32 ``[1, Hv, Dv, Dk]`` and the output ``[1, L, Hv, Dv]``.  For Mamba2 (``ssm_update``)
        they are hidden_states ``[1, L, H, Dh]``, B, C ``[1, L, G, Ds]``, dt ``[1, L, H]``, the
        state ``[1, H, Dh, Ds]`` and the output ``[1, L, H, Dh]``.

        Args:
            call: the rows of this step and the constants; ``call.name`` says which recurrence.
            layout: the rows: ``num_ordinary`` in sequence, then groups of ``mask_counts[i]`` masks,
                each of which follows ordinary row ``i``.
            state: the state before the kept rows; None at the start of a text.
            kept: rows as in ``call.rows`` that the last step kept and that are not in the state
                yet; None without any.

        Returns:
            The outputs ``[1, L, ...]`` of this step's rows and the state after the kept rows, which
            has none of this step's rows; None leaves the step to mlx-lm's function.
        """
        ...


class StateCache(Protocol):
    """What the seams of a recurrent layer ask of its cache; an answer's, a batch's or training's.

    mlx-lm's mixers also read and write its slots by index, and read ``lengths`` and
    ``left_padding``, which are None.
    """

    def convolve(self, slot: int, conv: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """Convolve the rows of the forward.

        Args:
            slot: the slot that has the convolution's last inputs.
            conv: the convolution, ``[B, K - 1 + L, C]`` to ``[B, L, C]``.
            x: the last inputs and the rows, ``[1, K - 1 + L, C]``.

        Returns:
            ``[1, L, C]``.
        """
        ...

    def recur(
        self, call: RecurrenceCall, step: StepRecurrence | None
    ) -> tuple[mx.array, mx.array | None]:
        """Run a recurrence, whose state is in the last slot, over the rows of the forward.

        Args:
            call: the mixer's call.
            step: a back-end's recurrence.

        Returns:
            The outputs, and a state for the mixer to write into the last slot.
        """
        ...


class MixerCall:
    """A mixer's call in progress: its cache, and how many convolutions it has called."""

    def __init__(
        self,
        cache: StateCache,
        step: StepRecurrence | None,
        functions: Mapping[str, RecurrenceFunction],
    ) -> None:
        self.functions = functions
        self._cache = cache
        self._step = step
        self._num_convs = 0

    def convolve(self, conv: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """Convolve ``[1, K - 1 + L, C]``; the convolutions of a mixer have the first slots."""
        slot, self._num_convs = self._num_convs, self._num_convs + 1
        return self._cache.convolve(slot, conv, x)

    def recur(self, call: RecurrenceCall) -> tuple[mx.array, mx.array | None]:
        """Run the mixer's recurrence."""
        return self._cache.recur(call, self._step)


class RecurrenceSeam(Wrapper):
    """A mixer of mlx-lm whose convolutions and recurrence ask the layer's cache.

    Every method that calls a recurrence is run with a namespace in which its name is bound anew.
    Without a cache of ours mlx-lm's function is called.

    Attributes:
        step: a back-end's recurrence.
        functions: a back-end's functions by the name of mlx-lm's.
    """

    def __init__(self, mixer: Any, *, scope: StepScope) -> None:
        super().__init__(mixer)
        self.step: StepRecurrence | None = None
        self.functions: Mapping[str, RecurrenceFunction] = types.MappingProxyType({})
        self._scope = scope
        self._training = mixer.training  # mlx-lm's mixers choose their kernel by it
        self._call: Any = type(mixer).__call__
        for name, method in _recurrent_methods(type(mixer)):
            bound = _with_recurrences(method, scope)
            if name == "__call__":
                self._call = bound
            else:
                object.__setattr__(self, name, types.MethodType(bound, self))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the mixer's own code."""
        cache = find_cache(args, kwargs)
        if cache is None:
            return self._call(self, *args, **kwargs)
        self._scope.mixer = MixerCall(cache, self.step, self.functions)
        try:
            return self._call(self, *args, **kwargs)
        finally:
            self._scope.mixer = None


def find_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Find the ``StateCache`` among the arguments of a mixer."""
    values = (*args, *kwargs.values())
    return next((value for value in values if hasattr(value, "recur")), None)


def inject_recurrence(base: nn.Module, step: StepRecurrence | None) -> None:
    """Let a back-end take over the recurrences of a model; None gives them back to mlx-lm."""
    for _, module in base.named_modules():
        if isinstance(module, RecurrenceSeam):
            module.step = step


def inject_functions(base: nn.Module, functions: Mapping[str, RecurrenceFunction]) -> None:
    """Let a back-end's functions run a model's recurrences, by the names of those of mlx-lm."""
    for _, module in base.named_modules():
        if isinstance(module, RecurrenceSeam):
            module.functions = types.MappingProxyType(dict(functions))


@contextmanager
def differentiable(base: nn.Module) -> Iterator[None]:
    """Let mixers call functions that have a gradient; mlx-lm's kernels have none."""
    seams = [module for module in base.modules() if isinstance(module, RecurrenceSeam)]
    before = [seam.training for seam in seams]
    for seam in seams:
        seam.train()
    try:
        yield
    finally:
        for seam, mode in zip(seams, before, strict=True):
            seam.train(mode)


def has_chunks(base: nn.Module) -> bool:
    """Whether a recurrence of a model takes several rows in another algebra than one row."""
    mixers = [type(x.wrapped) for _, x in base.named_modules() if isinstance(x, RecurrenceSeam)]
    methods = [method for mixer in mixers for _, method in _recurrent_methods(mixer)]
    names = {name for method in methods for name in _recurrence_names(method)}
    return not all(RECURRENCES[name].sequential for name in names)


def _recurrent_methods(mixer: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods of a class that call a recurrence by its global name."""
    for name in dir(mixer):
        method = inspect.getattr_static(mixer, name)
        if isinstance(method, types.FunctionType) and _recurrence_names(method):
            yield name, method


def _recurrence_names(method: types.FunctionType) -> list[str]:
    names = method.__code__.co_names
    return [name for name in RECURRENCES if name in names and name in method.__globals__]


def _with_recurrences(method: types.FunctionType, scope: StepScope) -> types.FunctionType:
    """Copy a method into a namespace in which recurrences ask the cache."""
    bound = {
        name: _asking(name, method.__globals__[name], scope) for name in _recurrence_names(method)
    }
    copied = types.FunctionType(
        method.__code__,
        {**method.__globals__, **bound},
        method.__name__,
        method.__defaults__,
        method.__closure__,
    )
    copied.__kwdefaults__ = method.__kwdefaults__
    return copied


def _asking(name: str, function: Any, scope: StepScope) -> Callable[..., Any]:
    """Make a function with the arguments of a recurrence that asks the cache of the mixer."""
    signature = inspect.signature(function)
    stock = RecurrenceFunction(function)

    def recur(*args: Any, **kwargs: Any) -> Any:
        if scope.mixer is None:
            return function(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        chosen = scope.mixer.functions.get(name, stock)
        return scope.mixer.recur(RecurrenceCall.of(name, chosen, arguments))

    return recur
