"""A plan: the layout of the next step and where its drafts come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_mtp.model.layout import StepLayout

# Sources of drafts.
MASK, LOOKUP, NATIVE, HEADS, DRAFT_MODEL = "mask", "lookup", "native", "heads", "draft-model"
SOURCES = (MASK, NATIVE, HEADS, DRAFT_MODEL, LOOKUP)
AUTO = "auto"  # all drafters that the model has the means for
DRAFTERS = (AUTO, *SOURCES)
CHAIN = f"{MASK}+{LOOKUP}"  # drafts of mask rows, then looked-up ones
FIXED_LAYOUTS = ("linear", "quadratic", "plain")
TREE = "tree"  # the most tokens per step within a number of rows
LAYOUTS = ("auto", TREE, *FIXED_LAYOUTS)


def counts_by_source(
    parts: Sequence[tuple[str, int]], num_accepted: int
) -> Iterator[tuple[str, int, int]]:
    """Divide the accepted drafts of a step among what proposed them.

    Args:
        parts: sources of its drafts, in order, with the number of drafts of each.
        num_accepted: accepted drafts, which come first.

    Yields:
        The source, its verified drafts and its accepted drafts.
    """
    for source, count in parts:
        accepted = min(count, num_accepted)
        num_accepted -= accepted
        yield source, count, accepted


@dataclass(frozen=True)
class Plan:
    """A planned step and the reasons for it.

    Attributes:
        layout: the rows.
        source: source of its drafts: one of ``SOURCES``, ``CHAIN``, or "" without any.
        num_first: in a chain, number of drafts of its first source.
        nodes: in a tree, which drafts of the offered tree are verified, counted from 1, ascending
            and each with its ancestors; ``layout.parents`` are their parents among them.
        is_probe: whether it was chosen to learn, not because it was expected to be the best.
        expected_tokens: tokens that it should emit.
        expected_ms: its expected duration.
        proposal_ms: expected part of proposing the drafts in it.
        plain_ms: expected duration of a step of one row.
    """

    layout: StepLayout
    source: str = ""
    num_first: int = 0
    nodes: tuple[int, ...] | None = None
    is_probe: bool = False
    expected_tokens: float = math.nan
    expected_ms: float = math.nan
    proposal_ms: float = 0.0
    plain_ms: float = math.nan

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """The sources of its drafts, in order, with the number of drafts of each."""
        count = self.layout.num_draft_tokens
        if self.source == CHAIN:
            return (MASK, self.num_first), (LOOKUP, count - self.num_first)
        return ((self.source, count),) if self.source else ()

    def report(self, num_accepted: int, ms: float) -> str:
        """One line for ``--explain`` about the step that ran; ``ms`` is NaN in a batch."""
        masks = ",".join(map(str, self.layout.mask_counts))
        count = self.layout.num_draft_tokens
        drafts = f"{count} {self.source} drafts" if self.source else "no drafts"
        text = f"step: {drafts}, masks {masks}, {self.layout.num_rows} rows"
        if not math.isnan(self.expected_ms):
            text += (
                f"; expected {self.expected_tokens:.2f} tokens "
                f"at the cost of {self.expected_ms / self.plain_ms:.2f} plain steps"
            )
        text += ", probe" if self.is_probe else ""
        duration = "in a batch" if math.isnan(ms) else f"{ms:.1f} ms"
        return f"{text} -> {num_accepted} accepted, {duration}"
