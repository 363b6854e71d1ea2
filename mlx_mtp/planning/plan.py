"""A plan: the layout of the next step and where its drafts come from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_mtp.model.layout import StepLayout

MASK, LOOKUP = "mask", "lookup"  # sources of drafts
FIXED_LAYOUTS = ("linear", "quadratic", "plain")
LAYOUTS = ("auto", *FIXED_LAYOUTS)


@dataclass(frozen=True)
class Plan:
    """A planned step and the reasons for it.

    Attributes:
        layout: the rows.
        source: source of its drafts: ``MASK``, ``LOOKUP`` or "" without any.
        is_probe: whether it was chosen to learn, not because it was expected to be the best.
        expected_tokens: tokens that it should emit.
        expected_ms: its expected duration.
        plain_ms: expected duration of a step of one row.
    """

    layout: StepLayout
    source: str = ""
    is_probe: bool = False
    expected_tokens: float = math.nan
    expected_ms: float = math.nan
    plain_ms: float = math.nan

    def report(self, num_accepted: int, ms: float) -> str:
        """A line about the step for ``--explain``; ``ms`` is NaN in a batch."""
        layout = self.layout
        drafts = f"{layout.num_draft_tokens} {self.source} drafts" if self.source else "plain"
        line = f"{drafts}, masks {','.join(map(str, layout.mask_counts))}: {layout.num_rows} rows"
        if not math.isnan(self.expected_ms):
            line += (
                f", {self.expected_tokens:.2f} tokens expected in {self.expected_ms:.1f} ms, "
                f"{self.plain_ms:.1f} ms for one plain token"
            )
        line += " (probe)" if self.is_probe else ""
        duration = "in a batch" if math.isnan(ms) else f"{ms:.1f} ms"
        return f"{line} -> {num_accepted} accepted, {duration}"
