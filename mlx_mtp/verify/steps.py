"""Do the rows of one step have the bits of the same rows computed one at a time?

After one prefill, some tokens are decoded plainly.  Then, from the same caches, one step of every
layout and depth verifies these tokens, its mask rows included.  Nothing but the number of rows
differs, so other bits show that a layer's sums depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.model.layout import StepLayout, linear_layout, quadratic_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import TREE
from mlx_mtp.verify.prefill import prefilled, rewound
from mlx_mtp.verify.rows import RowTally, compare_rows
from mlx_mtp.verify.settings import COPY, Way


def compare_steps(model: MTPModel, prompt: Sequence[int], ways: Sequence[Way]) -> RowTally:
    """Compare the verified rows of one step of each layout and depth with rows computed alone.

    Args:
        model: the model.
        prompt: ids of the prompt, which must leave room for the steps.
        ways: layouts and depths; ``"auto"`` has the steps of the others.
    """
    depth = max(depth for _, depth in ways)
    cache = prefilled(model, prompt)
    steps = list(decode(model, prompt[-1:], max_tokens=depth + 1, layout="plain", cache=cache))
    ids = [token for step in steps for token in step.tokens]
    rows = mx.concatenate([step.logits for step in steps])
    tally = RowTally()
    for layout, count in ways:
        step_layout = _layout(layout, min(count, len(ids) - 1), num_masks=count)
        if step_layout is None or (step_layout.is_tree and not cache.supports_trees):
            continue
        cache = rewound(model, cache, prompt)
        request = make_request(model, prompt[-1:], layout="plain", max_tokens=1, cache=cache)
        tokens = ids[: int(step_layout.depths.max())]
        if step_layout.is_tree:
            tokens += [(token + 1) % model.vocab_size for token in tokens]
        drafts = Drafts.certain(mx.array(tokens, mx.int32))
        [outcome] = run(model, [replace(request.plan(), layout=step_layout, drafts=drafts)])
        end = len(outcome.logits)
        tally += compare_rows(rows[:end], outcome.logits, model.dtype)
    return tally


def _layout(layout: str, num_draft_tokens: int, *, num_masks: int) -> StepLayout | None:
    if layout == "auto":
        return None
    if layout == TREE:  # a chain, and a sibling of each of its drafts
        chain = tuple(range(num_draft_tokens))
        counts = (num_masks, *(1,) * 2 * num_draft_tokens)
        return StepLayout(1, 2 * num_draft_tokens, counts, chain + chain)
    make = quadratic_layout if layout == "quadratic" else linear_layout
    num_masks = 0 if layout == COPY else num_masks
    return make(num_pending=1, num_draft_tokens=num_draft_tokens, num_masks=num_masks)
