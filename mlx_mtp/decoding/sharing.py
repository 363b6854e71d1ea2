"""Which answers' steps run in one forward: those that cost less so than one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_mtp.decoding.batching import can_batch
from mlx_mtp.decoding.step import Step, run_steps
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import widened

MOST_ROWS = 32  # of a shared forward: what our kernels take at once, a row's bits being the same


def run_together(steps: Sequence[Step], known: Speculation) -> None:
    """Run the next steps of several answers, in as few forwards as pays.

    Args:
        steps: of one model, one for each answer.
        known: what steps of this model cost; it is told how many answers shared.
    """
    groups = [list(steps)] if len(steps) == 1 else _groups(steps, known)
    for group in groups:
        run_steps(group)
    known.sharers = max(len(group) for group in groups)


def _groups(steps: Sequence[Step], known: Speculation) -> list[list[Step]]:
    """Steps that are to run together; wide ones, such as the end of a prompt, run alone."""
    alone = [[step] for step in steps if step.layout.num_rows > MOST_ROWS]
    narrow = [step for step in steps if step.layout.num_rows <= MOST_ROWS]
    if len(narrow) < 2 or not can_batch(narrow[0].decoder.model):
        return [*alone, *([step] for step in narrow)]
    context = int(np.mean([step.decoder.cache.offset for step in narrow]))
    ms = widened(known.costs.forward_ms(context), MOST_ROWS)
    groups: list[list[Step]] = []
    for step in sorted(narrow, key=lambda each: each.layout.num_rows):
        group = groups[-1] if groups else []
        rows, more = sum(each.layout.num_rows for each in group), step.layout.num_rows
        if group and rows + more <= MOST_ROWS and ms[rows + more] < ms[rows] + ms[more]:
            group.append(step)
        else:
            groups.append([step])
    return [*alone, *groups]
