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
    """A planned step and why.

    Attributes:
        layout: the step.
        source: where its drafts are from: ``MASK``, ``LOOKUP`` or "" without any.
        is_probe: whether it was taken to learn, not because it was thought best.
        expected_tokens: what it should emit.
        expected_ms: what it should take, at the pace of the measurement.
        plain_ms: what a step of one row takes.
    """

    layout: StepLayout
    source: str = ""
    is_probe: bool = False
    expected_tokens: float = math.nan
    expected_ms: float = math.nan
    plain_ms: float = math.nan

    def line(self) -> str:
        """For ``--explain``."""
        masks = ",".join(map(str, self.layout.mask_counts))
        drafts = f"{self.layout.num_draft_tokens} {self.source} drafts" if self.source else "plain"
        text = f"{drafts}, masks {masks}: {self.layout.num_rows} rows"
        if not math.isnan(self.expected_ms):
            text += (
                f", {self.expected_tokens:.2f} tokens expected in {self.expected_ms:.1f} ms, "
                f"{self.plain_ms:.1f} for one plain token"
            )
        return text + (" (trying)" if self.is_probe else "")
