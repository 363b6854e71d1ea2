"""Which answers' steps run as one batch: those that are faster batched than run separately."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mlx_mtp.decoding.batching import can_batch
from mlx_mtp.decoding.step import Step
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import widened

MAX_ROWS = 32  # of a batch: the limit of our kernels, up to which a row's bits do not change


class StepGrouper:
    """Groups the next steps of several answers into batches.

    Args:
        model: the model of all steps.
        speculation: what its steps cost; ``sharers`` is updated.
    """

    def __init__(self, model: MTPModel, speculation: Speculation) -> None:
        self._model = model
        self._speculation = speculation

    def groups(self, steps: Sequence[Step]) -> list[list[int]]:
        """Group steps, one for each answer.

        Returns:
            Indices of the steps that are to ``run`` together.  Prompt chunks and wide steps, such
            as the end of a prompt, come first and alone.
        """
        narrow = [
            i
            for i, step in enumerate(steps)
            if not step.is_prompt_chunk and step.layout.num_rows <= MAX_ROWS
        ]
        groups = [[i] for i in range(len(steps)) if i not in narrow]
        if len(narrow) < 2 or not self._can_batch:
            groups += [[i] for i in narrow]
        else:
            groups += self._batches(steps, narrow)
        if not all(step.is_prompt_chunk for step in steps):
            self._speculation.sharers = max(map(len, groups))
        return groups

    @cached_property
    def _can_batch(self) -> bool:
        return can_batch(self._model)

    def _batches(self, steps: Sequence[Step], narrow: list[int]) -> list[list[int]]:
        """Add steps in ascending order of width while that is cheaper than a separate forward."""
        context = int(np.mean([steps[i].cache.offset for i in narrow]))
        ms = widened(self._speculation.costs.forward_ms(context), MAX_ROWS)
        batches: list[list[int]] = []
        num_rows = 0  # of the last batch
        for i in sorted(narrow, key=lambda i: steps[i].layout.num_rows):
            more = steps[i].layout.num_rows
            total = num_rows + more
            if batches and total <= MAX_ROWS and ms[total] < ms[num_rows] + ms[more]:
                batches[-1].append(i)
                num_rows = total
            else:
                batches.append([i])
                num_rows = more
        return batches
