"""Layers that attend within chunks of positions, as Llama 4's do.

mlx-lm's model makes their mask for contiguous rows.  ``ChunkLayer`` asks the cache instead where a
step has mask rows (``caches.layers.ChunkLayerCache``).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.wrappers import Wrapper, replace


class ChunkLayer(Wrapper):
    """A layer whose mask is made by its cache where rows are not contiguous."""

    def __init__(self, layer: Any, *, scope: StepScope) -> None:
        super().__init__(layer)
        self._scope = scope

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Call the layer."""
        layout = self._scope.layout
        if cache is not None and layout is not None and not layout.is_contiguous:
            mask = cache.make_mask(x.shape[1], return_array=True)
        return self.wrapped(x, mask, cache)


def wrap_chunks(base: Any, scope: StepScope) -> None:
    """Wrap the layers of a model that attend within chunks, in place."""
    chunked = {
        index
        for index, cache in enumerate(lm_cache.make_prompt_cache(base))
        if isinstance(cache, lm_cache.ChunkedKVCache)
    }
    layers = {id(layer): layer for index, layer in enumerate(base.layers) if index in chunked}
    paths = {path: layers[id(x)] for path, x in base.named_modules() if id(x) in layers}
    replace(base, {path: ChunkLayer(layer, scope=scope) for path, layer in paths.items()})
