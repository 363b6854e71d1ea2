"""Several answers' steps in one forward: each row passes the layers once, with its own cache.

A step of few rows takes little longer than one of a single row, for the weights are read but once.
So the rows of several answers go through the linear layers together; each answer's queries meet its
own keys and values, with its own mask.  mlx-lm's models pass the cache, the mask and what the cache
hands out to one function (``attention_hook``), where the rows part and meet again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import base as lm_base

from mlx_mtp.attention_hook import hook
from mlx_mtp.cache import LayerCache, MTPCache
from mlx_mtp.layout import PackedLayout, StepLayout, StepScope, plain_layout, quadratic_layout
from mlx_mtp.model import MTPModel

_MOST_ERROR = 0.05  # of the largest value; see ``MTPModel._probe``


class _Several:
    """One value for each answer; what does anything with it but hand it on, fails."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts


class PackedLayerCache:
    """One layer's caches of several answers, as a model sees them in a packed forward."""

    def __init__(
        self, layers: Sequence[LayerCache], layout: PackedLayout, scope: StepScope
    ) -> None:
        self._layers = layers
        self._layout = layout
        self._scope = scope

    @property
    def offset(self) -> _Several:
        """Positions of the next rows; the wrapped rotary embeddings know better."""
        return _Several(self._layout.offsets)

    def make_mask(self, num_rows: int, **options: Any) -> _Several:
        """The mask of each answer's step."""
        assert num_rows == self._layout.num_rows
        packed, masks = self._scope.layout, []
        try:
            for layer, layout in zip(self._layers, self._layout.layouts, strict=True):
                self._scope.layout = layout
                masks.append(layer.make_mask(layout.num_rows, **options))
        finally:
            self._scope.layout = packed
        return _Several(masks)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[_Several, _Several]:
        """Append the rows of ``[1, H, L, D]`` to the caches they belong to."""
        parts = zip(
            self._layers,
            self._layout.unpack(keys, axis=2),
            self._layout.unpack(values, axis=2),
            strict=True,
        )
        held = [layer.update_and_fetch(*pair) for layer, *pair in parts]
        return _Several([each[0] for each in held]), _Several([each[1] for each in held])

    def attention(
        self, queries: mx.array, keys: _Several, values: _Several, *, scale: float, mask: _Several
    ) -> mx.array:
        """Attend from each answer's rows of ``[1, H, L, D]`` to its own keys and values."""
        each = zip(
            self._layers,
            self._layout.unpack(queries, axis=2),
            keys.parts,
            values.parts,
            mask.parts,
            strict=True,
        )
        return self._layout.pack([_attend(*one, scale=scale) for one in each], axis=2)


def _attend(
    layer: LayerCache, queries: mx.array, keys: Any, values: Any, mask: Any, *, scale: float
) -> mx.array:
    """What the layer's own attention gives, or mlx-lm's."""
    if layer.attention is not None:
        result = layer.attention(queries, keys, values, scale=scale, mask=mask)
        if result is not None:
            return result
    return lm_base.scaled_dot_product_attention(
        queries, keys, values, cache=layer, scale=scale, mask=mask
    )


class PackedCache:
    """The caches of several answers, in a packed forward.

    Args:
        caches: one for each answer.
        layout: the forward.
        scope: the model's step scope.
    """

    offset = 0  # rows of a packed layout know their positions

    def __init__(
        self, caches: Sequence[MTPCache], layout: PackedLayout, *, scope: StepScope
    ) -> None:
        each_layer = zip(*(cache.layers for cache in caches), strict=True)
        self.layers = [PackedLayerCache(layers, layout, scope) for layers in each_layer]


def packed_forward(
    model: MTPModel,
    rows: Sequence[list[int]],
    caches: Sequence[MTPCache],
    layouts: Sequence[StepLayout],
) -> list[mx.array]:
    """Run the steps of several answers in one forward.

    Args:
        model: one for which ``can_pack`` holds.
        rows: ids of each step, ordinary rows first.
        caches: of each answer; its rows are appended.
        layouts: of each step.

    Returns:
        Final hidden states of each step, ``[rows, D]``.
    """
    layout = PackedLayout(tuple(layouts), tuple(cache.offset for cache in caches))
    pairs = list(zip(rows, layouts, strict=True))
    ids = [token for each, step in pairs for token in each[: step.num_ordinary]]
    ids += [token for each, step in pairs for token in each[step.num_ordinary :]]
    cache = PackedCache(caches, layout, scope=model.scope)
    return layout.unpack(model(mx.array([ids]), cache=cache, layout=layout)[0], axis=0)


def can_pack(model: MTPModel) -> bool:
    """Whether a packed forward gives what separate ones do; tried once, with a few rows.

    A model that does more with positions, masks or keys than hand them on cannot be packed.
    """
    if model.packs is None:
        model.packs = hook(model.base) and model.wrap_ropes() and _agrees(model)
    return model.packs


def _agrees(model: MTPModel) -> bool:
    layouts = [plain_layout(), StepLayout(1, 2, (0, 0, 0))]
    if model.num_draft_tokens:
        layouts += [quadratic_layout(num_pending=1, num_draft_tokens=1, num_masks=1)]
    rows = [[3, 1, 2][: each.num_ordinary] + each.mask_offsets.tolist() for each in layouts]
    prompts = [[1, 2], [4, 3, 2, 1], [2, 5, 1]]
    held = [_held(model, prompt) for prompt in prompts[: len(layouts)]]
    alone = [
        model(mx.array([ids]), cache=cache, layout=layout)[0]
        for ids, cache, layout in zip(rows, held, layouts, strict=True)
    ]
    for cache, layout in zip(held, layouts, strict=True):
        cache.rewind(layout.num_rows)
    try:
        packed = packed_forward(model, rows, held, layouts)
        wanted, given = (mx.concatenate(each).astype(mx.float32) for each in (alone, packed))
        error = mx.abs(given - wanted).max() / (mx.abs(wanted).max() + 1e-6)
        return bool((error < _MOST_ERROR).item())
    except (TypeError, ValueError, AttributeError, IndexError):
        return False


def _held(model: MTPModel, prompt: list[int]) -> MTPCache:
    """Caches that hold a prompt."""
    cache = model.make_cache()
    cache.begin_step()
    mx.eval(model(mx.array([prompt]), cache=cache))
    return cache
