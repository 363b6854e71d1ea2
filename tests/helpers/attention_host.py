"""Step attention on the CPU executor: problems, their answers in float64, launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.metal.attention import Mask, merge_launch, step_attention_launch
from mlx_mtp.model.layout import linear_layout, quadratic_layout
from tests.helpers.kernel_host import float64, run_launch
from tests.metal_host import Report

BEHIND = 24  # keys that a cache has room for; they are no numbers
ULP = {mx.float32: 0.0, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Attention:
    """Queries ``[1, H, M, D]`` as a model hands them over, keys and values as a KVCache does."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    mask: Mask = None

    @property
    def scale(self) -> float:
        return self.queries.shape[-1] ** -0.5

    def rows(self, first: int, last: int, *, keys: int, mask: Mask = None) -> Attention:
        """Some of the rows, with fewer keys."""
        held = (self.keys[..., :keys, :], self.values[..., :keys, :])
        return Attention(self.queries[:, :, first:last], *held, mask)

    def exact(self) -> np.ndarray:
        """The result in float64; zero for a row that sees nothing."""
        queries, keys, values = (float64(each) for each in (self.queries, self.keys, self.values))
        shared_by = queries.shape[1] // keys.shape[1]
        keys, values = (np.repeat(each, shared_by, axis=1) for each in (keys, values))
        scores = queries @ keys.transpose(0, 1, 3, 2) * self.scale
        rows, count = scores.shape[-2:]
        sees = np.ones((rows, count), dtype=bool)
        if isinstance(self.mask, mx.array):
            sees = np.array(self.mask)
        elif self.mask == "causal":
            sees = np.tri(rows, count, count - rows, dtype=bool)
        weights = np.where(sees, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        return weights @ values / np.maximum(weights.sum(-1, keepdims=True), 1e-300)

    def run(self, **options: Any) -> tuple[mx.array, list[Report]]:
        """The kernels' result and what the executor saw."""
        launch = step_attention_launch(
            self.queries, self.keys, self.values, scale=self.scale, mask=self.mask
        )
        partial, first = run_launch(launch, **options)
        heads, dtype = self.queries.shape[1], self.queries.dtype
        y, second = run_launch(merge_launch(partial, heads=heads, dtype=dtype), **options)
        return y.transpose(0, 2, 1, 3), [first, second]


def attention(
    rows: int,
    count: int,
    *,
    head_dim: int = 64,
    heads: int = 3,
    kv_heads: int = 1,
    dtype: mx.Dtype = mx.float32,
    mask: Mask = None,
    seed: int = 0,
) -> Attention:
    """A random problem whose keys and values are slices of something larger."""
    keys = mx.random.split(mx.random.key(seed), 3)
    queries = mx.random.normal((1, rows, heads, head_dim), key=keys[0]).astype(dtype)
    held = [mx.random.normal((1, kv_heads, count, head_dim), key=key) for key in keys[1:]]
    wide = [(0, 0), (0, 0), (0, BEHIND), (0, 0)]
    caches = [mx.pad(each, wide, constant_values=float("nan")).astype(dtype) for each in held]
    slices = [cache[..., :count, :] for cache in caches]
    mx.eval(queries, slices)
    return Attention(queries.transpose(0, 2, 1, 3), slices[0], slices[1], mask)


def step_mask(rows: int, count: int, *, quadratic: bool = False) -> mx.array:
    """The mask of a step with mask rows behind a context, bool ``[rows, count]``."""
    if quadratic:
        drafts = rows // 3 - 1  # 1 + drafts ordinary rows, two masks for each
        layout = quadratic_layout(num_pending=1, num_draft_tokens=drafts, num_masks=2)
    else:
        masks = rows // 2
        layout = linear_layout(
            num_pending=1, num_draft_tokens=rows - 1 - masks, num_masks=max(masks, 0)
        )
    assert layout.num_rows <= rows
    own = np.tri(rows, dtype=bool)
    own[: layout.num_rows, : layout.num_rows] = np.array(layout.attention)
    return mx.pad(mx.array(own), [(0, 0), (count - rows, 0)], constant_values=True)


def is_right(y: mx.array, wanted: np.ndarray) -> bool:
    """Within 1e-5 of the largest value and, where the type is shorter, one rounding."""
    assert y.shape == wanted.shape
    bound = 1e-5 * np.abs(wanted).max() + ULP[y.dtype] * np.abs(wanted)
    return bool(np.all(np.abs(float64(y) - wanted) <= bound))
