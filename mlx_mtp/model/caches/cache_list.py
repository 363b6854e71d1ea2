"""Several caches of one layer, such as one of its attention and one of its recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.models import cache as lm_cache

from mlx_mtp.model.caches.layers import LayerCache
from mlx_mtp.model.caches.recurrent import RecurrentLayerCache
from mlx_mtp.model.layout import RowLayout

PartCache = LayerCache | RecurrentLayerCache


class LayerCacheList:
    """The caches of one layer, in the place of mlx-lm's ``CacheList``.

    The layer takes them by index; all have the same rows.
    """

    def __init__(self, caches: Sequence[PartCache]) -> None:
        self.caches = list(caches)

    def __getitem__(self, index: int) -> PartCache:
        return self.caches[index]

    @property
    def offset(self) -> int:
        """Position of the next row."""
        return self.caches[0].offset

    def begin_forward(self, num_rows: int, layout: RowLayout | None) -> None:
        """Begin a forward of some rows."""
        for cache in self.caches:
            cache.begin_forward(num_rows, layout)

    def begin_step(self) -> None:
        """Drop rows that no later row can see."""
        for cache in self.caches:
            cache.begin_step()

    def rewind(self, num_rows: int) -> None:
        """Drop the last rows."""
        for cache in self.caches:
            cache.rewind(num_rows)

    def can_rewind(self, num_rows: int) -> bool:
        """Whether that many rows can be dropped exactly."""
        return all(cache.can_rewind(num_rows) for cache in self.caches)

    @property
    def drops_rows(self) -> bool:
        """Whether ``begin_step`` will drop rows."""
        return any(cache.drops_rows for cache in self.caches)

    def copied(self) -> LayerCacheList:
        """Make an independent copy."""
        return LayerCacheList([cache.copied() for cache in self.caches])

    @property
    def state(self) -> list[Any]:
        """The arrays, for evaluation."""
        return [cache.state for cache in self.caches]

    def to_mlx_lm(self, into: Any = None) -> Any:
        """Return the caches as a ``CacheList``.

        Args:
            into: the ``CacheList`` that they came from, which is updated.
        """
        theirs = (None,) * len(self.caches) if into is None else into.caches
        pairs = zip(self.caches, theirs, strict=True)
        caches = [cache.to_mlx_lm(inner) for cache, inner in pairs]
        if into is None:
            return lm_cache.CacheList(*caches)
        into.caches = tuple(caches)
        return into
