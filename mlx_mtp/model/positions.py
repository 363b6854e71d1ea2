"""Seams at which a model learns the positions of a step's rows.

Rows of a step are not contiguous: masks follow different drafts.  Models compute with positions in
a few ways, and each has a wrapper here that gives every row its own:

- a module rotates queries and keys (``StepRope``), or a function or method does;
- positions have learned embeddings (``StepPositions``);
- queries are scaled by a function of the position.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.parts import module_at
from mlx_mtp.model.wrappers import Rebound, Wrapper, own_call, replace

_ROPES = ("rope", "rotary_emb")  # names of modules
_ROTATE = "apply_rotary_emb"  # of a function of rows and ``offset``
_ROTATE_METHOD = "_rope"  # of a method of rows and ``offset``
_SCALE = "_get_llama_4_attn_scale"  # of a function of the number of rows and ``offset``
_SCALED = "attn_temperature_tuning"  # of an attribute; the block scales by ``mx.arange``


class StepPositions(nn.Module):
    """A learned embedding of positions that gives each row of a step its own."""

    def __init__(self, table: Any, *, scope: StepScope) -> None:
        super().__init__()
        self.table = table
        self._scope = scope

    @property
    def weight(self) -> mx.array:
        """The table."""
        return self.table.weight

    def __call__(self, positions: mx.array) -> mx.array:
        """Map positions ``[..., L]``, which are contiguous, to ``[..., L, D]``."""
        layout = self._scope.layout
        if layout is None or layout.is_contiguous:
            return self.table(positions)
        rows = self._scope.positions_from(positions[..., :1])
        last = self.weight.shape[0] - 1  # masks may reach past the table; their drafts do not
        return self.table(mx.minimum(rows, last))


class StepRope(nn.Module):
    """A rotary embedding that rotates each row of a step by its own position."""

    def __init__(self, rope: Any, *, scope: StepScope):
        super().__init__()
        self.rope = rope
        self._scope = scope

    def __call__(self, x: mx.array, offset: Any = 0, **options: Any) -> mx.array:
        """Rotate ``[1, H, L, Dh]``; rows become a batch of length-1 sequences."""
        layout = self._scope.layout
        if layout is None or layout.is_contiguous:
            return self.rope(x, offset=offset, **options)
        rows = x.transpose(2, 1, 0, 3)  # [L, H, 1, Dh]
        rows = self.rope(rows, offset=self._scope.positions_from(offset), **options)
        return rows.transpose(2, 1, 0, 3)


class StepArange:
    """``mlx.core`` for code whose ``arange`` numbers contiguous rows, the first position as 1."""

    def __init__(self, scope: StepScope) -> None:
        self._scope = scope

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def arange(self, start: Any, stop: Any) -> mx.array:
        """Number the rows of the forward, of which the first is ``start`` if it is ordinary."""
        layout = self._scope.layout
        if layout is None or layout.is_contiguous:
            return mx.arange(start, stop)
        return self._scope.positions_from(start - 1) + 1


class StepCode(Rebound):
    """A module that calls functions of a row's position."""


class OwnRope(Wrapper):
    """An attention block with a method that rotates rows."""

    def __init__(self, block: nn.Module, scope: StepScope) -> None:
        super().__init__(block)
        rope = StepRope(getattr(block, _ROTATE_METHOD), scope=scope)
        object.__setattr__(self, _ROTATE_METHOD, rope)  # not in the block, which it would call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block's own code."""
        return own_call(self.wrapped)(self, *args, **kwargs)


def wrap_positions(base: Any, tables: Sequence[str], scope: StepScope) -> bool:
    """Let each row of a step have its own position; what is wrapped already stays as it is.

    Args:
        base: the model, which is changed in place.
        tables: paths of learned embeddings of positions.
        scope: the model's step scope.

    Returns:
        Whether the model knows positions.
    """
    modules = dict.fromkeys(_ropes(base), StepRope) | dict.fromkeys(tables, StepPositions)
    wrapped: dict[str, Any] = {}
    for path, kind in modules.items():
        module = module_at(base, path)
        if not isinstance(module, kind):
            wrapped[path] = kind(module, scope=scope)
    replace(base, wrapped)
    blocks = {path: module for path, module in base.named_modules() if path}
    for path in sorted(blocks, key=len, reverse=True):  # one may be inside another
        block = _wrapped(blocks[path], scope)
        if block is not None:
            replace(base, {path: block})
    return bool(modules) or any(map(_is_wrapped, base.modules()))


def counts_keys(base: nn.Module) -> bool:
    """Whether blocks rotate queries by the number of keys that they are given (AFM 7)."""

    def counts(module: Any) -> bool:
        while isinstance(module, Wrapper):
            module = module.wrapped
        arguments = inspect.signature(type(module).__call__).parameters
        return "keys" in arguments and "cache" not in arguments

    blocks = {path.rpartition(".")[0] for path in _ropes(base)}
    return any(counts(module_at(base, path)) for path in blocks if path)


def _ropes(base: Any) -> list[str]:
    """Find the paths of rotary embeddings, wrapped or not."""
    paths = [path for path, _ in base.named_modules() if path.rpartition(".")[-1] in _ROPES]
    return [path for path in paths if path.rpartition(".")[0] not in paths]


def _is_wrapped(module: Any) -> bool:
    """Whether a module, or one inside its wrappers, gives rows their positions."""
    while isinstance(module, Wrapper) and not isinstance(module, OwnRope | StepCode):
        module = module.wrapped
    return isinstance(module, OwnRope | StepCode)


def _wrapped(module: Any, scope: StepScope) -> nn.Module | None:
    """Wrap a module whose own code computes with positions."""
    if isinstance(module, Wrapper):
        return None
    call = own_call(module)
    names = getattr(getattr(call, "__code__", None), "co_names", ())
    if _ROTATE_METHOD in names and hasattr(module, _ROTATE_METHOD):
        return OwnRope(module, scope)
    bound: dict[str, Any] = {}
    if _ROTATE in names:
        bound[_ROTATE] = StepRope(call.__globals__[_ROTATE], scope=scope)
    if _SCALE in names:
        bound[_SCALE] = _step_scale(call.__globals__[_SCALE], scope)
    if _SCALED in names:
        bound["mx"] = StepArange(scope)
    return StepCode(module, bound) if bound else None


def _step_scale(original: Callable[..., mx.array], scope: StepScope) -> Callable[..., mx.array]:
    """Make a function that scales each row of a step by its own position."""

    @functools.wraps(original)
    def scale(size: int, offset: Any, *args: Any) -> mx.array:
        layout = scope.layout
        if layout is None or layout.is_contiguous:
            return original(size, offset, *args)
        rows = original(1, scope.positions_from(offset), *args)  # one text per row
        return rows.reshape(size, 1)

    return scale
