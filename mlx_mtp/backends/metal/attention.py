"""Attention for the few rows of a step, which reads keys and values once.

The source is in ``metal/step_attention*.metal``.  One kernel processes spans of 128 keys, a second
one merges the spans; the order of summation depends on a key's index alone, so a row has the same
bits whatever the number of rows.  ``choice`` decides whether the kernel is used.

The form (spans in parallel, then a merge) is that of flash-decoding (Dao et al., 2023); many query
heads for one read of the keys, as in MLX's ``sdpa_vector_2pass_1_gqa`` and FlashInfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_mtp.backends.metal import matmul as kernels
from mlx_mtp.backends.metal.matmul import DTYPES, MAX_ROWS, Launch

Mask = mx.array | Literal["causal"] | None

SPAN = 128
HEAD_DIMS = (64, 80, 96, 128, 256)
_HEADS_PER_SIMDGROUP = 4  # query heads of a simdgroup
_CHUNK_BYTES = 128  # of a key that are in threadgroup memory together
_SMALLEST = 8  # elements; MLX passes smaller arrays in another address space


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """How the first kernel divides its work.

    Attributes:
        tiles: threadgroups that share a span and a kv head.
        head_groups: simdgroups of a threadgroup with query heads of their own.
        each: query heads of a simdgroup.
        key_groups: simdgroups of a threadgroup with keys of their own.
        chunk: dimensions that are in threadgroup memory together.
    """

    tiles: int
    head_groups: int
    each: int
    key_groups: int
    chunk: int

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return 32 * self.head_groups * self.key_groups


def attention_plan(query_heads: int, *, head_dim: int, dtype: mx.Dtype) -> AttentionPlan:
    """Divide the query heads of one kv head: up to 32 of them read the keys together.

    Args:
        query_heads: rows times heads that share a kv head.
        head_dim: of a head; beyond 128 up to 16 query heads read the keys together.
        dtype: of the keys.
    """
    max_groups = 8 if head_dim <= 128 else 4
    tiles = -(-query_heads // (max_groups * _HEADS_PER_SIMDGROUP))
    of_tile = -(-query_heads // tiles)
    groups = -(-of_tile // _HEADS_PER_SIMDGROUP)
    # Few query heads leave simdgroups to read several tiles of keys at once.
    return AttentionPlan(
        tiles=tiles,
        head_groups=groups,
        each=min(of_tile, _HEADS_PER_SIMDGROUP),
        key_groups=4 if groups <= 2 else 2 if groups <= 4 else 1,
        chunk=_chunk(head_dim, dtype.size),
    )


def takes(queries: mx.array, keys: mx.array, values: mx.array, mask: Any = None) -> bool:
    """Whether there is a kernel for these arguments of ``step_attention_kernel``.

    That the elements of a key are contiguous is up to the caller.
    """
    if queries.ndim != 4 or keys.ndim != 4 or keys.shape != values.shape:
        return False
    (batch, heads, rows, dims), (_, kv_heads, count, key_dims) = queries.shape, keys.shape
    one_type = queries.dtype == keys.dtype == values.dtype and keys.dtype in DTYPES
    fits = batch == keys.shape[0] == 1 and dims == key_dims in HEAD_DIMS and heads % kv_heads == 0
    return one_type and fits and 1 <= rows <= MAX_ROWS and _takes_mask(mask, rows, count)


def step_attention_ops(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask = None
) -> mx.array:
    """Attend from rows ``[1, H, M, D]`` to keys ``[1, Hkv, N, D]``; with MLX's own operation."""
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def step_attention_launch(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask = None
) -> Launch:
    """Describe how the first kernel processes the spans.

    Args:
        queries: ``[1, H, M, D]``, of any strides.
        keys: ``[1, Hkv, N, D]``; the D elements of a key are contiguous and start at a multiple of
            16 bytes, as in a slice of mlx-lm's ``KVCache``.
        values: likewise; finite, even where no row may see them.
        scale: of the scores.
        mask: bool ``[M, N]`` (or with ones before), ``causal`` or None.

    Returns:
        A launch whose output is float32 ``[M * H, spans, D + 2]``: sums, the largest score (times
        log2 e), the sum of weights.
    """
    (_, heads, rows, head_dim), (_, kv_heads, count, _) = queries.shape, keys.shape
    plan = attention_plan(rows * heads // kv_heads, head_dim=head_dim, dtype=keys.dtype)
    spans = -(-count // SPAN)
    arrays: dict[str, Any] = {
        "queries": queries,
        "keys": keys,
        "values": values,
        "scale": kernels.number(scale),
    }
    sees, kind = _SEES_ALL, "all"
    if isinstance(mask, mx.array):
        arrays["mask"] = _mask_rows(mask)
        sees, kind = _SEES_MASKED, "masked"
    elif mask == "causal":
        sees, kind = _SEES_CAUSALLY, "causal"
    return Launch(
        name=f"mlx_mtp_step_attention_{kind}",
        source=sees + _SPANS_CALL,
        inputs=arrays,
        template={
            "T": keys.dtype,
            "head_dim": head_dim,
            "chunk": plan.chunk,
            "each": plan.each,
            "head_groups": plan.head_groups,
            "key_groups": plan.key_groups,
        },
        grid=(spans * plan.threads, kv_heads, plan.tiles),
        threadgroup=(plan.threads, 1, 1),
        output_shape=(rows * heads, spans, head_dim + 2),
        output_dtype=mx.float32,
        row_contiguous=False,
    )


def merge_launch(partial: mx.array, *, heads: int, dtype: mx.Dtype) -> Launch:
    """Describe how the second kernel merges the spans.

    Args:
        partial: result of the first kernel.
        heads: H.
        dtype: of the result.

    Returns:
        A launch whose output is ``[1, M, H, D]``.
    """
    head_dim = partial.shape[-1] - 2
    threads = -(-head_dim // 32) * 32
    return Launch(
        name="mlx_mtp_step_attention_merge",
        source=_MERGE_CALL,
        inputs={"partial": partial},
        template={"T": dtype, "head_dim": head_dim},
        grid=(partial.shape[0] * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shape=(1, partial.shape[0] // heads, heads, head_dim),
        output_dtype=dtype,
    )


def step_attention_kernel(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Mask = None
) -> mx.array:
    """Attend from rows ``[1, H, M, D]`` to keys ``[1, Hkv, N, D]``; on Metal.

    The result of a row that may see nothing is zero.  Arguments as in ``step_attention_launch``.

    Raises:
        RuntimeError: see ``matmul.run``.
    """
    launch = step_attention_launch(queries, keys, values, scale=scale, mask=mask)
    merge = merge_launch(kernels.run(launch), heads=queries.shape[1], dtype=queries.dtype)
    return kernels.run(merge).transpose(0, 2, 1, 3)


def _chunk(head_dim: int, size: int) -> int:
    """The number of dimensions that divides ``head_dim`` and leaves the fewest lanes idle."""
    step = 16 // size
    sizes = [dims for dims in range(step, _CHUNK_BYTES // size + 1, step) if head_dim % dims == 0]
    return max(sizes, key=lambda dims: (dims / (-(-dims // 32) * 32), dims))


def _takes_mask(mask: Any, rows: int, count: int) -> bool:
    if not isinstance(mask, mx.array):
        return mask is None or (mask == "causal" and rows <= count)
    return (
        mask.dtype == mx.bool_
        and mask.size == rows * count
        and mask.ndim >= 2
        and mask.shape[-2:] == (rows, count)
    )


def _mask_rows(mask: mx.array) -> mx.array:
    mask = mask.reshape(mask.shape[-2:])
    short = -(-_SMALLEST // mask.shape[0]) - mask.shape[1]
    return mx.pad(mask, [(0, 0), (0, short)]) if short > 0 else mask


_SEES_ALL = "const SeeAll sees{};\n"
_SEES_CAUSALLY = "const SeeCausally sees{keys_shape[2] - queries_shape[2]};\n"
_SEES_MASKED = "const SeeMasked sees{mask, long(mask_strides[0]), long(mask_strides[1])};\n"
_SPANS_CALL = """typedef SpanPlan<T, head_dim, chunk, each, head_groups, key_groups> Plan;
threadgroup float4 staged_queries[each * head_groups * head_dim / 4];
threadgroup uint4 staged[Plan::staged];
threadgroup float maxima[key_groups * head_groups * each];
threadgroup float4 weights[key_groups * head_groups * each * 8];
const uint3 tile = threadgroup_position_in_grid;
const StepQueries<T> from{
    queries, long(queries_strides[1]), long(queries_strides[2]), long(queries_strides[3]),
    queries_shape[1], keys_shape[1], queries_shape[2]};
const HeldKeys<T> held{
    keys + tile.y * keys_strides[1], values + tile.y * values_strides[1],
    long(keys_strides[2]), long(values_strides[2]), keys_shape[2]};
const SpanResult result{
    y, from.heads, from.kv_heads, from.rows, (held.count + SPAN - 1) / SPAN};
step_attention_spans<Plan>(
    from, held, sees, scale, result, reinterpret_cast<threadgroup float*>(staged_queries),
    staged, maxima, reinterpret_cast<threadgroup float*>(weights), tile,
    thread_index_in_threadgroup);
"""
_MERGE_CALL = """step_attention_merge<T, head_dim>(
    partial, y, partial_shape[1], threadgroup_position_in_grid.x, thread_index_in_threadgroup);
"""
