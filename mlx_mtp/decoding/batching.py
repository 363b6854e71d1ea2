"""Several answers' steps in one forward: each row passes the layers once, with its own cache.

A step of few rows takes little longer than one of a single row, for the weights are read but once.
So the rows of several answers go through the linear layers together; each answer's queries meet its
own keys and values, with its own mask (``packed_cache``).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp.model.batch_cache import BatchCache
from mlx_mtp.model.cache import MTPCache
from mlx_mtp.model.layout import BatchLayout, StepLayout, plain_layout, quadratic_layout
from mlx_mtp.model.mtp_model import MTPModel

_MOST_ERROR = 0.05  # of the largest value; see ``MTPModel._probe``


def batch_forward(
    model: MTPModel,
    rows: Sequence[list[int]],
    caches: Sequence[MTPCache],
    layouts: Sequence[StepLayout],
) -> list[mx.array]:
    """Run the steps of several answers in one forward.

    Args:
        model: one for which ``can_batch`` holds.
        rows: ids of each step, ordinary rows first.
        caches: of each answer; its rows are appended.
        layouts: of each step.

    Returns:
        Final hidden states of each step, ``[rows, D]``.
    """
    layout = BatchLayout(tuple(layouts), tuple(cache.offset for cache in caches))
    pairs = list(zip(rows, layouts, strict=True))
    ids = [token for each, step in pairs for token in each[: step.num_ordinary]]
    ids += [token for each, step in pairs for token in each[step.num_ordinary :]]
    cache = BatchCache(caches, layout, scope=model.scope)
    return layout.unpack(model(mx.array([ids]), cache=cache, layout=layout)[0], axis=0)


def can_batch(model: MTPModel) -> bool:
    """Whether a packed forward gives what separate ones do; tried once, with a few rows.

    A model that does more with positions, masks or keys than hand them on cannot be packed.
    """
    if model.packs is None:
        model.packs = model.wrap_attention() and model.wrap_ropes() and _agrees(model)
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
        packed = batch_forward(model, rows, held, layouts)
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
