"""Several answers' steps in one forward: each row passes the layers once, with its own cache.

A step of few rows takes little longer than one of a single row, because the weights are read once.
So the rows of several answers go through the linear layers together; each answer's queries meet its
own keys and values, with its own mask, and its recurrent layers continue its own states
(``caches.batch``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.model.caches.batch import BatchCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.head import PartialHead
from mlx_mtp.model.layout import BatchLayout, StepLayout, plain_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.costs import is_one_pass_cheaper

_MAX_ERROR = 0.05  # of the largest value; see ``MTPModel._probe``


def forward(
    model: MTPModel,
    ids: Sequence[mx.array],
    caches: Sequence[MTPCache],
    layouts: Sequence[StepLayout],
) -> list[mx.array]:
    """Run the steps of one or several answers in one forward.

    Args:
        model: one for which ``can_batch`` is true if there are several.
        ids: ids of each step's rows ``[rows]``, ordinary rows first.
        caches: of each answer; its rows are appended.
        layouts: of each step.

    Returns:
        Final hidden states of each step, ``[rows, D]``.
    """
    if len(ids) == 1:
        # One row is as a model has it anyway: its layers need not look at a layout.
        alone = layouts[0] if layouts[0].num_rows > 1 else None
        return [model(ids[0][None], cache=caches[0], layout=alone)[0]]
    layout = BatchLayout(tuple(layouts), tuple(cache.offset for cache in caches))
    cache = BatchCache(caches, layout, scope=model.scope)
    rows = layout.pack(ids, axis=0)
    return layout.unpack(model(rows[None], cache=cache, layout=layout)[0], axis=0)


def head(model: MTPModel | PartialHead, parts: Sequence[mx.array]) -> list[mx.array]:
    """Logits ``[n, V]`` of several arrays of hidden states ``[n, D]``, in one pass of the head."""
    if len(parts) < 2:
        return [model.logits(part[None])[0] for part in parts]
    ends = list(accumulate(map(len, parts)))
    logits: Any = model.logits(mx.concatenate(list(parts))[None])[0]
    return list(mx.split(logits, ends[:-1]))


def has_one_pass(
    model: MTPModel, layouts: Sequence[StepLayout], times: Sequence[np.ndarray | None]
) -> bool:
    """Whether the head passes once over all rows, because that is expected to take less time.

    Args:
        model: the model.
        layouts: of each step; there is nothing to decide without mask rows.
        times: of a forward by its rows, ``[R + 1]``, as each step knows them; the first counts, and
            there are two passes without any.
    """
    row_ms = next((ms for ms in times if ms is not None), None)
    groups = [max(layout.mask_counts) for layout in layouts if layout.num_masks]
    if not groups or row_ms is None:
        return not groups
    frequent = model.frequent
    return is_one_pass_cheaper(
        row_ms,
        verified=sum(layout.num_draft_tokens + 1 for layout in layouts),
        drafted=sum(groups),
        num_rows=sum(layout.num_rows - layout.num_pending + 1 for layout in layouts),
        share=1.0 if frequent is None else frequent.ids.size / model.vocab_size,
    )


def can_batch(model: MTPModel) -> bool:
    """Check whether a batch gives what separate forwards give, by running a few rows.

    Batching requires that the model only passes positions, masks, keys and states through.
    """
    knows_positions, has_seams = model.wrap_ropes(), model.wrap_attention()
    if not (knows_positions or model.is_recurrent):
        return False
    if model.make_cache().attention_layers and not has_seams:
        return False
    layouts = [plain_layout(), StepLayout(1, 2, (0, 0, 0))]
    if model.num_draft_tokens:
        branches = None if model.is_recurrent else (0, 0)
        layouts += [StepLayout(1, 2, (1, 0, 1), branches)]
    ids = [
        mx.array([3, 1, 2][: layout.num_ordinary] + layout.mask_offsets.tolist())
        for layout in layouts
    ]
    prompts = [[1, 2], [4, 3, 2, 1], [2, 5, 1]]
    caches = [_prefilled(model, prompt) for prompt in prompts[: len(layouts)]]
    alone = [
        model(row_ids[None], cache=cache, layout=layout)[0]
        for row_ids, cache, layout in zip(ids, caches, layouts, strict=True)
    ]
    for cache, layout in zip(caches, layouts, strict=True):
        cache.rewind(layout.num_rows)
    try:
        batch = mx.concatenate(forward(model, ids, caches, layouts)).astype(mx.float32)
        expected = mx.concatenate(alone).astype(mx.float32)
        error = mx.abs(batch - expected).max() / (mx.abs(expected).max() + 1e-6)
        return bool((error < _MAX_ERROR).item())
    except (TypeError, ValueError, AttributeError, IndexError):
        return False


def _prefilled(model: MTPModel, prompt: list[int]) -> MTPCache:
    """Caches with a prompt."""
    cache = model.make_cache()
    cache.begin_step()
    mx.eval(model(mx.array([prompt]), cache=cache))
    return cache
